"""What a likelihood p(y | z) has to offer, and what the built-in ones share: weights, normalisers, checks of targets.

``nll`` is the sum over targets divided by ``count``. Nothing else is divided: Fisher products, factors and scores are
those of one example's own nll, and the library applies ``1/count`` in one place.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol, get_args, runtime_checkable
from typing import Literal as Word

import torch
from jaxtyping import Float
from torch import Tensor

Normalizer = Word["example", "element", "none"]


@runtime_checkable
class Likelihood(Protocol):
    """A user's own distribution with these methods works everywhere in the library.

    Optional, looked up by name: ``needs_targets`` (the curvature depends on y), ``curvature_weight(z, y, weight)``
    (what multiplies F_R, broadcastable to z), ``fisher_diagonal(z)``, ``score(z, y)``, ``to_mean(z)``,
    ``mean_fisher_product(p, v)``, ``check_output(z)`` and ``validate(z, y)``.
    """

    def nll(self, z: Tensor, y: Any, *, weight: Tensor | None = None, count: Any = None) -> Tensor:
        """The negative log-likelihood summed over targets and divided by count: a 0-d tensor, differentiable in z."""
        ...

    def count(self, z: Tensor, y: Any = None, weight: Tensor | None = None) -> Tensor:
        """What ``nll`` divides by: a 0-d tensor."""
        ...

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw ``y ~ p(y | z)``, joint over the outputs and positions of an example."""
        ...

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        """``F_R(z) v`` per example; v is shaped like z, or has more leading dimensions."""
        ...

    def fisher_factor(self, z: Tensor) -> Tensor:
        """S with ``S Sᵀ = F_R(z)`` per example, ``[*z.shape, k]``."""
        ...


@runtime_checkable
class MeanParametrised(Protocol):
    """What a likelihood offers that knows its Fisher in the parametrisation by its mean or its probabilities."""

    def to_mean(self, z: Tensor) -> Tensor:
        """The mean of p(y | z), or the probabilities of the classes, shaped like z."""
        ...

    def mean_fisher_product(self, p: Tensor, v: Tensor) -> Tensor:
        """``D(p) v`` with ``J_pᵀ D J_p = F_R`` [NATGRAD, sec. 3, eqs. 9-13]."""
        ...


def score(likelihood: Likelihood, z: Float[Tensor, "batch ..."], y: Any) -> Float[Tensor, "batch ..."]:
    """``d(Σ nll)/dz`` of the unweighted nll, for integer or drawn targets: its own, or by differentiation."""
    own = getattr(likelihood, "score", None)
    if own is not None:
        return own(z, y)
    return _differentiated(likelihood, z, y)[1]


def is_plain_sum(likelihood: Likelihood) -> bool:
    """Whether nll is divided by nothing (normaliser "none"): counts of parts of a batch then do not add up."""
    return getattr(likelihood, "normalizer", None) == "none"


def nll_and_score(
    likelihood: Likelihood, z: Float[Tensor, "batch ..."], y: Any
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch ..."]]:
    """The summed nll (divided by nothing) and its derivative with respect to z: its own, or by differentiation."""
    own = getattr(likelihood, "nll_and_score", None)
    if own is not None:
        return own(z, y)
    return _differentiated(likelihood, z, y)


def _differentiated(likelihood: Any, z: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        nll = likelihood.nll(leaf, y, count=1)
    (derivative,) = torch.autograd.grad(nll, leaf)
    return nll.detach(), derivative


class Normalised(ABC):
    """Sum over targets, divided by a count: what every built-in likelihood does.

    Args:
        normalizer: ``"example"`` divides by dimension 0 of z, ``"element"`` by the number of targets that count (those
            whose weight is not zero), ``"none"`` by 1.
    """

    normalizers: tuple[str, ...] = get_args(Normalizer)

    def __init__(self, normalizer: str = "example") -> None:
        if normalizer not in self.normalizers:
            known = ", ".join(map(repr, self.normalizers))
            raise ValueError(f"{type(self).__name__}(normalizer={normalizer!r}): expected one of {known}")
        self.normalizer = normalizer

    @property
    def needs_targets(self) -> bool:
        """Whether the curvature depends on the targets, through weights that they select."""
        return False

    def nll(self, z: Tensor, y: Tensor, *, weight: Tensor | None = None, count: Any = None) -> Float[Tensor, ""]:
        """The weighted sum of the targets' negative log-likelihoods, divided by ``count`` (default: :meth:`count`).

        Args:
            z: the model's output, ``[batch, ...]``.
            y: the targets.
            weight: per target; of fewer dimensions it is per example (broadcast from the left).
            count: a divisor in place of the normaliser's.

        Raises:
            ValueError: y does not fit z in shape, dtype or device.
        """
        self.check(z, y)
        losses = self.losses(z, y)
        if weight is not None:
            losses = losses * expand_weight(weight, losses)
        return losses.sum() / (self.count(z, y, weight) if count is None else count)

    def nll_and_score(self, z: Tensor, y: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, "batch ..."]]:
        """``nll(z, y, count=1)`` and its derivative with respect to z, without a graph."""
        return _differentiated(self, z, y)

    def count(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Float[Tensor, ""]:
        """What ``nll`` divides by: a 0-d tensor in z's dtype.

        Raises:
            ValueError: the count depends on targets that are not given.
        """
        if self.normalizer == "element":
            return self.elements(z, y, weight).to(z.dtype)
        return torch.as_tensor(z.shape[0] if self.normalizer == "example" else 1, dtype=z.dtype, device=z.device)

    def elements(self, z: Tensor, y: Tensor | None, weight: Tensor | None) -> Tensor:
        """The number of targets that count."""
        if weight is None:
            return torch.as_tensor(z.numel(), device=z.device)
        return torch.count_nonzero(expand_weight(weight, z).expand_as(z))

    def curvature_weight(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor | None:
        """What multiplies F_R(z) in the curvature of ``nll``, broadcastable to z; None for ones."""
        return None if weight is None else expand_weight(weight, z).to(z.dtype)

    def fisher_diagonal(self, z: Tensor) -> Tensor | None:
        """The diagonal of F_R(z), shaped like z, where that matrix is diagonal; None otherwise."""
        return None

    def check_output(self, z: Tensor) -> None:
        """Refuse an output z that no targets of this likelihood would fit; costs nothing."""
        if z.ndim == 0 or z.shape[0] == 0:
            raise ValueError(f"z: the batch is empty or has no batch dimension (shape {tuple(z.shape)})")
        if not z.is_floating_point():
            raise ValueError(f"z: {type(self).__name__} expects real numbers, got {z.dtype}")

    def check(self, z: Tensor, y: Any) -> None:
        """Refuse targets of the wrong type, shape, dtype or device; costs nothing and never waits for the device."""
        check_pair(type(self).__name__, z, y)
        if y.shape != z.shape:
            raise ValueError(
                f"targets: expected shape {tuple(z.shape)}, that of the model's output z; got {tuple(y.shape)}"
            )
        if not self.accepts(y.dtype):
            raise ValueError(
                f"targets: {type(self).__name__} expects floating-point targets; got {y.dtype}; use y.to(z.dtype)"
            )

    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether targets may have this dtype."""
        return dtype.is_floating_point

    def validate(self, z: Tensor, y: Any) -> None:
        """:meth:`check`, and whether the values of y are possible; waits for the device."""
        self.check(z, y)

    @abstractmethod
    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood of every target, with the likelihood's own weights."""


def check_pair(name: str, z: Tensor, y: Any) -> None:
    """z and y are tensors with examples, on one device."""
    if not isinstance(y, Tensor):
        raise TypeError(f"targets: {name} expects a tensor, got {type(y).__name__}")
    if z.ndim == 0 or z.shape[0] == 0:
        raise ValueError(f"z: the batch is empty or has no batch dimension (shape {tuple(z.shape)})")
    if y.device != z.device:
        raise ValueError(f"targets: on {y.device}, the model's output on {z.device}; move one")


def own_weight(name: str, weight: Tensor | None) -> Tensor | None:
    """A weight that a likelihood is made with: a tensor without negative values, or None.

    Raises:
        TypeError: it is no tensor.
        ValueError: a value is negative: the curvature would have no square root.
    """
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(weight).__name__}")
    if bool((weight < 0).any()):
        raise ValueError(f"{name}: expected weights of at least 0; got {weight.min().item():g}")
    return weight


def trailing_weight(name: str, weight: Tensor | None, z: Tensor) -> Tensor | None:
    """A likelihood's own weight with z's dtype and device.

    Raises:
        ValueError: it does not broadcast to z, last dimensions matched first.
    """
    if weight is None:
        return None
    trailing = z.shape[max(z.ndim - weight.ndim, 0) :]
    if weight.ndim > z.ndim or any(w not in (1, n) for w, n in zip(weight.shape, trailing, strict=True)):
        raise ValueError(f"{name}: shape {tuple(weight.shape)} does not broadcast to z's shape {tuple(z.shape)}")
    return weight.to(z)


def expand_weight(weight: Tensor, like: Tensor) -> Tensor:
    """A weight with trailing dimensions added, so that its leading dimensions are those of the targets.

    Raises:
        TypeError: it is no tensor.
        ValueError: it does not broadcast to the targets, or is on another device.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    if weight.device != like.device:
        raise ValueError(f"weight: on {weight.device}, the model's output on {like.device}; move one")
    expanded = weight.reshape(*weight.shape, *[1] * (like.ndim - weight.ndim))
    if expanded.ndim > like.ndim or any(w not in (1, n) for w, n in zip(expanded.shape, like.shape, strict=True)):
        raise ValueError(f"weight: shape {tuple(weight.shape)} does not fit targets of shape {tuple(like.shape)}")
    return expanded


def diagonal_factor(diagonal: Tensor) -> Float[Tensor, "batch ... k"]:
    """S with ``S Sᵀ = diag``, per example, from the diagonal of F_R."""
    flat = torch.diag_embed(diagonal.sqrt().reshape(diagonal.shape[0], -1))
    return flat.reshape(*diagonal.shape, -1)
