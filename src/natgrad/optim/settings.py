"""K-FAC's settings as objects: damping, guard, periods, subsets. Every constant stands here with its source."""

import math
from dataclasses import dataclass

from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt


@dataclass(frozen=True)
class Damping:
    """λ and γ: how they start, how they enter the inverse and how they move.

    Args:
        value: λ at the first update (without η). None: the power of ten that lowers the loss of the first batch most.
        form: how damping enters the inverse of a block: exact or factored Tikhonov.
        rule: the λ rule, or None to keep λ.
        gamma: the γ rule, or None for ``γ = ratio √(λ + η)`` at every update.
        ratio: of γ and √(λ + η) where no rule moves γ. M has the exact F and needs little damping, its block-diagonal
            approximation more: 4 was better than 1 and 10 on three data sets (``docs/log.md``).
    """

    value: float | None = None
    form: ExactTikhonov | FactoredTikhonov = FactoredTikhonov()
    rule: LevenbergMarquardt | None = LevenbergMarquardt(every=1, decay=0.6, minimum=1e-3)
    gamma: GreedyGamma | None = None
    ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.value is not None and not 0 <= self.value < math.inf:
            raise ValueError(f"damping={self.value}: λ must be a non-negative number, or None to search for it")
        if not self.ratio > 0:
            raise ValueError(f"Damping(ratio={self.ratio}): expected a positive number")


@dataclass(frozen=True)
class StepGuard:
    """When an update is rejected: θ is kept, δ₀ forgotten, and λ raised.

    Args:
        threshold: reject below this reduction ratio ρ.
        raise_damping: what λ is then multiplied by.
    """

    threshold: float = 0.0
    raise_damping: float = 1.5

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or not 0 < self.raise_damping < math.inf:
            raise ValueError(f"{self}: expected a number as threshold and a positive raise_damping, such as 1.5")


@dataclass(frozen=True)
class Periods:
    """How often what is refreshed, in updates.

    Args:
        inverses: T₃; the inverses are also refreshed at the updates in ``early``.
        early: update numbers (from 1) at which the statistics are too young to wait for T₃.
    """

    inverses: int = 10
    early: tuple[int, ...] = (1, 2, 3, 5)

    def __post_init__(self) -> None:
        if self.inverses < 1:
            raise ValueError(f"{self}: expected inverses >= 1, a number of updates")

    def due(self, update: int) -> bool:
        """Whether the inverses are refreshed at this update (counted from 1)."""
        return update % self.inverses == 0 or update in self.early


@dataclass(frozen=True)
class Renewal(Periods):
    """How often a `Preconditioner` renews what, in optimiser steps; the steps in ``early`` renew everything.

    Args:
        inverses: as in :class:`Periods`.
        early: as in :class:`Periods`.
        statistics: the factors are estimated anew every so many steps.
    """

    inverses: int = 20
    statistics: int = 5

    def __post_init__(self) -> None:
        if self.inverses < 1 or self.statistics < 1:
            raise ValueError(f"{self}: expected inverses >= 1 and statistics >= 1, numbers of steps")

    def observes(self, step: int) -> bool:
        """Whether statistics are due at this step (counted from 1)."""
        return step % self.statistics == 0 or step in self.early


@dataclass(frozen=True)
class Subsets:
    """Which share of a batch's rows is used for what [KFAC, sec. 8].

    Args:
        factors: τ₁, the share whose sampled targets update the factors.
        curvature: τ₂, the share on which F Δ and ρ are computed; at least τ₁.
        minimum: use at least this many rows for either, where the batch has them.
    """

    factors: float = 1 / 8
    curvature: float = 1 / 4
    minimum: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.factors <= self.curvature <= 1:
            raise ValueError(
                f"Subsets(factors={self.factors}, curvature={self.curvature}): expected 0 < factors <= curvature <= 1"
            )

    def rows(self, batch: int) -> tuple[int, int]:
        """How many rows of a batch serve the factors, and how many F Δ and ρ."""
        factors, curvature = (math.ceil(share * batch) for share in (self.factors, self.curvature))
        return min(batch, max(self.minimum, factors)), min(batch, max(self.minimum, curvature))
