"""How λ and γ change as training proceeds: two small state machines without state [KFAC, sec. 6.5, 6.6].

Each rule maps old values and measurements to new values; the optimiser keeps the values (0-d tensors on the device).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LevenbergMarquardt:
    """The λ rule: ``ρ > 3/4 → λ ← ω₁ λ``; ``ρ < 1/4 → λ ← λ / ω₁`` [KFAC, sec. 6.5].

    Args:
        every: T₁, the number of updates between two uses of the rule.
        decay: the factor per update; ``ω₁ = decay ** every``.
        minimum: λ never falls below this many times the mean eigenvalue of the approximate Fisher; 0 (the paper) for no
            floor. Optimisers without an approximate Fisher take it as a value of λ.
    """

    every: int = 5
    decay: float = 19 / 20
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"LevenbergMarquardt(every={self.every}): expected a positive number of updates")
        if not 0 < self.decay < 1:
            raise ValueError(f"LevenbergMarquardt(decay={self.decay}): expected a number between 0 and 1, such as 0.95")

    def __call__(
        self, lam: Float[Tensor, ""], rho: Float[Tensor, ""], scale: Float[Tensor, ""] | float = 1.0
    ) -> Float[Tensor, ""]:
        """The new λ; unchanged where ρ is between 1/4 and 3/4 or not a number.

        Args:
            lam: the present λ.
            rho: the reduction ratio.
            scale: the mean eigenvalue of the approximate Fisher, the unit of ``minimum``.
        """
        omega = self.decay**self.every
        floor = torch.as_tensor(self.minimum * scale, dtype=lam.dtype, device=lam.device)
        shrunk = torch.minimum(lam, torch.maximum(lam * omega, floor))
        return torch.where(rho > 0.75, shrunk, torch.where(rho < 0.25, lam / omega, lam))


def check_rule(rule: object) -> None:
    """Refuse what is no rule of λ: neither None nor an object like :class:`LevenbergMarquardt`.

    Raises:
        TypeError: with what arrived.
    """
    if rule is not None and not (callable(rule) and hasattr(rule, "every")):
        raise TypeError(
            "rule: expected natgrad.LevenbergMarquardt(...) or an object like it (called with λ and ρ, with every), "
            f"or None to keep λ; got {rule!r}"
        )


@dataclass(frozen=True)
class GreedyGamma:
    """The γ rule: every T₂ updates the best of γ, ω₂ γ and γ / ω₂ [KFAC, sec. 6.6].

    Args:
        every: T₂; a multiple of T₃, the period of the inverses (each candidate needs its own inverse).
        decay: the factor per update before the root; ``ω₂ = sqrt(decay) ** every``.
        quality: what "best" means: ``"model"``, the value M(δ) of the quadratic model at the best coefficients, or
            ``"loss"``, h(θ + δ) on the same rows.
        bounded: keep γ ≤ √(λ + η). The published rule has no bound, and can run away on a plateau.
        minimum: γ never falls below this.
    """

    every: int = 20
    decay: float = 19 / 20
    quality: str = "model"
    bounded: bool = False
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"GreedyGamma(every={self.every}): expected a positive number of updates")
        if self.quality not in ("model", "loss"):
            raise ValueError(f"GreedyGamma(quality={self.quality!r}): expected 'model' or 'loss'")

    def candidates(self, gamma: Float[Tensor, ""], bound: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], ...]:
        """(γ, ω₂ γ, γ / ω₂), clipped to [minimum, bound] where the rule is bounded.

        Args:
            gamma: the present γ.
            bound: √(λ + η).
        """
        omega = (self.decay**0.5) ** self.every
        values = (gamma, gamma * omega, gamma / omega)
        if self.bounded:
            values = tuple(torch.minimum(value, bound) for value in values)
        return tuple(value.clamp(min=self.minimum) for value in values)
