"""How long a preconditioned gradient is when somebody else's learning rate multiplies it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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
        if not self.radius > 0:
            raise ValueError(f"KLClip(radius={self.radius}): expected a positive number")

    def __call__(self, product: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """ν for ``product = ∇h·U``."""
        bounded = (2 * self.radius / product).sqrt().clamp(max=1.0)
        return torch.where(product > 0, bounded, torch.ones_like(product))
