r"""Derivatives at the output z whose second moment is the output's Fisher matrix, by expectation.

``F_R(z) = Σ_c S_c S_cᵀ`` for the columns S_c of a factor ("exact"), or ``E_y[∇_z ∇_zᵀ]`` over targets y that the
model itself draws ("sampled") [KFAC, sec. 5]. Training targets give another matrix, the empirical Fisher ("empirical").
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.likelihoods import Likelihood, score

Expectation = Literal["exact", "sampled", "empirical"]

# Cotangents per stack: at most so many, fewer where z is large.
_AT_ONCE = 16
_ELEMENTS_AT_ONCE = 2**21


def check_expectation(likelihood: Likelihood, expectation: str, targets: Any, samples: int, name: str = "y") -> None:
    """Refuse what cannot be estimated.

    Raises:
        ValueError: an unknown expectation, no draws, or targets that are missing where the curvature depends on them.
    """
    if expectation not in get_args(Expectation):
        known = ", ".join(map(repr, get_args(Expectation)))
        raise ValueError(f"expectation={expectation!r}: expected one of {known}")
    if samples < 1:
        raise ValueError(f"samples={samples}: expected at least one draw of y per example")
    if targets is None and expectation == "empirical":
        raise ValueError(f"expectation='empirical' needs the training targets: pass {name}=")
    if targets is None and getattr(likelihood, "needs_targets", False):
        raise ValueError(
            f"the curvature of {type(likelihood).__name__} depends on the targets here (class weights, ignored or "
            f"weighted targets): pass {name}="
        )


def validate_targets(likelihood: Likelihood, z: Tensor, targets: Any) -> None:
    """Refuse an output that does not fit, and impossible targets.

    The likelihood's cheap checks are made everywhere, those that read values on the CPU.

    Raises:
        ValueError: as the likelihood's ``check_output``, ``check`` and ``validate``.
    """
    fits = getattr(likelihood, "check_output", None)
    if fits is not None:
        fits(z)
    check = getattr(likelihood, "validate" if z.device.type == "cpu" else "check", None)
    if targets is not None and check is not None:
        check(z, targets)


def cotangents(
    likelihood: Likelihood,
    z: Float[Tensor, "batch ..."],
    *,
    expectation: str = "sampled",
    targets: Any = None,
    weight: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Float[Tensor, "k batch ..."]]:
    r"""Stacks of cotangents at z; the sum over all of them of ``c cᵀ`` (in expectation) is ``w F_R(z)``.

    F_R is that of each example. The draws of a sampled estimate are divided by ``√samples``. Every cotangent is that
    of the summed nll: nothing is divided by a count.

    Args:
        likelihood: p(y | z).
        z: the model's output, without a graph.
        expectation: ``"exact"``, ``"sampled"`` or ``"empirical"``.
        targets: y; for ``"empirical"``, and where the curvature depends on y.
        weight: per-target weights of the loss.
        samples: draws of y per example.
        generator: the source of the draws.
    """
    if expectation == "empirical":
        yield _derivative(likelihood, z, targets, weight)[None]
        return
    root = _root_weight(likelihood, z, targets, weight)
    if expectation == "sampled":
        scale = samples**-0.5 if root is None else root * samples**-0.5
        at_once = _at_once(z)
        for start in range(0, samples, at_once):
            draws = [_draw(likelihood, z, generator) for _ in range(min(at_once, samples - start))]
            yield draws[0][None] * scale if len(draws) == 1 else torch.stack(draws) * scale
        return
    for columns in _factor_columns(likelihood, z):
        yield columns if root is None else columns * root


def fisher_diagonal(
    likelihood: Likelihood, z: Float[Tensor, "batch ..."], targets: Any = None, weight: Tensor | None = None
) -> Float[Tensor, "batch ..."] | None:
    """The diagonal of ``w F_R(z)`` where that matrix is diagonal, None otherwise."""
    diagonal = _unweighted_diagonal(likelihood, z)
    if diagonal is None:
        return None
    w = _curvature_weight(likelihood, z, targets, weight)
    return diagonal if w is None else diagonal * w


def _factor_columns(likelihood: Likelihood, z: Tensor) -> Iterator[Tensor]:
    """Stacks of columns of the factor S."""
    diagonal = _unweighted_diagonal(likelihood, z)
    if diagonal is not None:  # one column per output, never a matrix per example
        values = diagonal.expand_as(z).sqrt().reshape(z.shape[0], -1)
        at_once = _at_once(z)
        for start in range(0, values.shape[1], at_once):
            index = torch.arange(start, min(start + at_once, values.shape[1]), device=z.device)
            stack = values.new_zeros(len(index), *values.shape)
            stack[index - start, :, index] = values[:, index].T
            yield stack.reshape(-1, *z.shape)
        return
    S = likelihood.fisher_factor(z)
    for part in S.split(_at_once(z), dim=-1):
        yield part.movedim(-1, 0)


def _unweighted_diagonal(likelihood: Likelihood, z: Tensor) -> Tensor | None:
    known = getattr(likelihood, "fisher_diagonal", None)
    return None if known is None else known(z)


def _at_once(z: Tensor) -> int:
    return max(1, min(_AT_ONCE, _ELEMENTS_AT_ONCE // z.numel()))


def _draw(likelihood: Likelihood, z: Tensor, generator: torch.Generator | None) -> Tensor:
    return score(likelihood, z, likelihood.sample(z, generator=generator))


def _root_weight(likelihood: Likelihood, z: Tensor, targets: Any, weight: Tensor | None) -> Tensor | None:
    w = _curvature_weight(likelihood, z, targets, weight)
    return None if w is None else w.sqrt()


def _curvature_weight(likelihood: Likelihood, z: Tensor, targets: Any, weight: Tensor | None) -> Tensor | None:
    if isinstance(weight, Tensor) and weight.device.type == "cpu" and (weight < 0).any():
        raise ValueError(
            f"weight: holds negative numbers, down to {float(weight.min()):g}, with which the curvature is no metric; "
            "leave weight out for that of the plain loss, or use expectation='empirical'"
        )
    known = getattr(likelihood, "curvature_weight", None)
    if known is not None:
        return known(z, targets, weight=weight)
    if weight is not None:
        raise ValueError(f"weight: {type(likelihood).__name__} has no curvature_weight(z, y, weight) that could use it")
    return None


def _derivative(likelihood: Likelihood, z: Tensor, targets: Any, weight: Tensor | None) -> Tensor:
    """d/dz of the summed, weighted nll."""
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        nll = likelihood.nll(leaf, targets, weight=weight, count=1)
    return torch.autograd.grad(nll, leaf)[0]
