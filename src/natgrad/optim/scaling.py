"""How long a preconditioned gradient is when somebody else's learning rate multiplies it."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor


class Scaling(Protocol):
    """What ``Preconditioner(scaling=...)`` takes: a factor ν for every layer, from numbers that stay on the device."""

    def measure(self, gradient: Tensor, update: Tensor) -> Tensor:
        """What has to be known of one layer: the same number of values for each, not finite where the layer is not.

        Args:
            gradient: ∇ of the layer's block, ``[W b]`` as a matrix.
            update: U of the same shape.
        """
        ...

    def scales(self, measures: Float[Tensor, "layers ..."]) -> Float[Tensor, " layers"]:
        """ν of every layer from what :meth:`measure` returned for each."""
        ...


@dataclass(frozen=True)
class KLClip:
    r"""Bounds how far a step of learning rate 1 moves the model's distribution.

    A step −U, with ``U = (F̆ + λ I)^{-1} ∇h`` over all covered layers, changes p(y|z) by a Kullback-Leibler divergence
    of about ``½ Uᵀ F̆ U ≤ ½ ∇h·U``. U is multiplied by ``ν = min(1, √(2 radius / ∇h·U))``, so that this never exceeds
    ``radius``.

    Args:
        radius: the bound, in nats per example for a likelihood that is normalised per example.
    """

    radius: float = 0.01

    def __post_init__(self) -> None:
        if not hasattr(self.radius, "__float__"):
            raise TypeError(f"KLClip(radius={self.radius!r}): expected a number, such as 0.01")
        if not self.radius > 0:
            raise ValueError(f"KLClip(radius={self.radius}): expected a positive number")

    def __call__(self, product: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """ν for ``product = ∇h·U``."""
        bounded = (2 * self.radius / product).sqrt().clamp(max=1.0)
        return torch.where(product > 0, bounded, torch.ones_like(product))

    def measure(self, gradient: Tensor, update: Tensor) -> Float[Tensor, ""]:
        """``∇·U`` of one layer."""
        return torch.dot(gradient.reshape(-1), update.reshape(-1))

    def scales(self, measures: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
        """The same ν for every layer."""
        return self(measures.sum()).expand(len(measures))


@dataclass(frozen=True)
class Grafting:
    r"""The direction of U with the length of the gradient: the inner optimiser's learning rate keeps its meaning.

    ``ν = ‖∇h‖ / ‖U‖``, by layer or over all covered layers: what reaches the inner optimiser is as long as the gradient
    that it would have had without a preconditioner. Inside plain SGD a step is exactly as long as that of SGD,
    ``lr ‖∇h‖`` in every layer, so that a learning rate (with its schedule) that was tuned for SGD can stay. Momentum
    averages grafted gradients. An optimiser that divides by the size of past gradients (Adam) takes most of any scale
    out again: inside it grafting changes little. The damping only turns the direction. (Agarwal et al. 2020 graft the
    length of any optimiser's step; this is the case of SGD's.)

    Args:
        per: ``"layer"``: one ν for each layer; ``"model"``: one for all of them.
    """

    per: Literal["layer", "model"] = "layer"

    def __post_init__(self) -> None:
        known = get_args(type(self).__annotations__["per"])
        if self.per not in known:
            raise ValueError(f"Grafting(per={self.per!r}): expected one of {', '.join(map(repr, known))}")

    def measure(self, gradient: Tensor, update: Tensor) -> Float[Tensor, "2"]:
        """``‖∇‖²`` and ``‖U‖²`` of one layer."""
        return torch.stack([gradient.square().sum(), update.square().sum()])

    def scales(self, measures: Float[Tensor, "layers 2"]) -> Float[Tensor, " layers"]:
        """``‖∇‖ / ‖U‖``; 1 where both are zero."""
        found = measures if self.per == "layer" else measures.sum(0).expand_as(measures)
        ratio = (found[:, 0] / found[:, 1]).sqrt()
        return torch.where(found[:, 1] > 0, ratio, torch.where(found[:, 0] >= 0, 1.0, torch.nan))


@dataclass(frozen=True)
class Unscaled:
    """ν = 1: what ``scaling=None`` stands for."""

    def measure(self, gradient: Tensor, update: Tensor) -> Float[Tensor, ""]:
        """A number that is finite where U is."""
        return update.sum()

    def scales(self, measures: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
        """Ones."""
        return torch.ones_like(measures)
