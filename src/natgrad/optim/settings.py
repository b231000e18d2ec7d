"""K-FAC's settings as objects: damping, guard, periods, subsets. Every constant stands here with its source."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.quadratic import Subspace

# Smaller relative changes of a loss in single precision may be rounding.
_ROUNDING = 1e-6
# A rejected update is tried again at this share at least.
_SHORTEST = 0.1
# After so many, ε = min(1 − 1/k, 0.95) is at its cap.
_EARLY_UPDATES = 20


@dataclass(frozen=True)
class Damping:
    """λ and γ: how they start, how they enter the inverse and how they move.

    Args:
        value: λ at the first update (without η). None: ``start`` times the mean eigenvalue of F̆ on the first batch.
        form: how damping enters the inverse of a block, and how it is inverted. None leaves it to the structure: exact
            Tikhonov for EKFAC, else factored; the block-diagonal one inverts factors of 256 rows and more as
            ``LowRank(128)``, the block-tridiagonal one those of 384 and more as ``LowRank(192)`` (``docs/decisions``,
            0005 and 0006). ``FactoredTikhonov()`` inverts all of them as they are.
        rule: the λ rule, or None to keep λ.
        gamma: the γ rule, or None for ``γ = ratio √(λ + η)`` at every update.
        ratio: of γ and √(λ + η) where no rule moves γ. M has the exact F and needs little damping, its block-diagonal
            approximation more: 4 was better than 1 and 10 on three data sets (``docs/decisions``, 0003).
        start: see ``value``.
    """

    value: float | None = None
    form: ExactTikhonov | FactoredTikhonov | None = None
    rule: LevenbergMarquardt | None = LevenbergMarquardt(every=1, decay=0.6, minimum=1e-2)
    gamma: GreedyGamma | None = None
    ratio: float = 4.0
    start: float = 0.03

    def __post_init__(self) -> None:
        if self.value is not None and not hasattr(self.value, "__float__"):
            raise TypeError(
                f"damping={self.value!r}: expected a number, a natgrad.Damping, or None for the first batch's"
            )
        if self.value is not None and not 0 <= self.value < math.inf:
            raise ValueError(f"damping={self.value}: λ must be a non-negative number, or None for the first batch's")
        for name in ("ratio", "start"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Damping({name}={getattr(self, name)}): expected a positive number")


@dataclass(frozen=True)
class StepGuard:
    """What happens to an update that does not do what M promised.

    It is shortened to the minimum of the parabola through what was found (see :meth:`shorter`) and tried once more.
    Failing that it is rejected: θ is kept, δ₀ forgotten, and λ raised.

    Args:
        threshold: an update fails below this reduction ratio ρ.
        raise_damping: what λ is multiplied by after a rejected update, at least: where the loss rose, λ becomes what
            would have made M's curvature along the update the observed one.
        tolerance: an update also fails where the loss of rows that had no part in F rises by more than this share of
            it. M knows a few rows only, and an update may suit just them.
        raise_shortened: what λ is multiplied by after an update that had to be shortened.
    """

    threshold: float = 0.0
    raise_damping: float = 4.0
    tolerance: float = 0.02
    raise_shortened: float = 2.0

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"StepGuard(tolerance={self.tolerance}): expected a non-negative share")
        raises = self.raise_damping, self.raise_shortened
        if math.isnan(self.threshold) or not all(0 < value < math.inf for value in raises):
            raise ValueError(
                f"{self}: expected a number as threshold, and positive raise_damping and raise_shortened, such as 2"
            )

    def accepts(self, rho: Tensor, before: Tensor, rise: Tensor) -> Bool[Tensor, ""]:
        """Whether an update stays.

        Args:
            rho: its reduction ratio.
            before: the loss of the rows held out.
            rise: how much higher that loss is at the new parameters.
        """
        return (rho >= self.threshold) & (rise <= self.tolerance * before.abs())

    def shorter(self, model: Subspace, coefficients: Tensor, actual: Tensor) -> Float[Tensor, ""]:
        """The share t of a rejected update δ that minimises ``h + t ∇h·δ + ½ t² c``, between a tenth and a half.

        Args:
            model: M on the rows that it was built from.
            coefficients: of δ in it.
            actual: h(θ + δ) − h(θ) = ∇h·δ + ½ c.
        """
        slope = model.slope @ coefficients
        best = slope / (2 * (slope - actual))
        return torch.nan_to_num(best, nan=_SHORTEST).clamp(_SHORTEST, 0.5)

    def raised(
        self, lam: Tensor, model: Subspace, coefficients: Tensor, actual: Tensor, before: Tensor, norm: Tensor
    ) -> Float[Tensor, ""]:
        """λ after a rejected update δ: ``λ + (c − δᵀ C δ) / ‖δ‖²`` with ``h(θ+δ) − h(θ) = ∇h·δ + ½ c``.

        Multiplying λ by a constant alone would take dozens of rejected updates where the Fisher matrix is a small part
        of the Hessian. A change that may be rounding tells nothing: then λ is multiplied by ``raise_damping``.

        Args:
            lam: λ.
            model: M on the rows that it was built from; C is its curvature.
            coefficients: of δ in it.
            actual: h(θ + δ) − h(θ).
            before: h(θ).
            norm: ‖δ‖.
        """
        excess = 2 * (actual - model.slope @ coefficients) - coefficients @ model.curvature @ coefficients
        observed = lam + excess / norm**2
        telling = torch.isfinite(observed) & (actual > _ROUNDING * before.abs())
        least = lam * self.raise_damping
        return torch.where(telling, torch.maximum(observed, least), least)


@dataclass(frozen=True)
class Rescaling:
    """What the exact F scales in a proposal Δ.

    Args:
        layers: True: each layer's part Δ_l gets a coefficient of its own where the inverses are renewed
            (``docs/decisions``, 0007); α and μ then scale ``Σ c_l Δ_l`` and δ₀ at every update. False: α and μ alone,
            as [KFAC, sec. 6.4, 7] has it. None leaves it to the structure: the block-tridiagonal inverse couples its
            layers and has them scaled together.
        ridge: what the curvature of each part is multiplied by beyond itself when the coefficients are found: it comes
            from the curvature rows of one batch.
        least: no coefficient is less than this share of what its layer would get if no other moved.
    """

    layers: bool | None = None
    ridge: float = 0.3
    least: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf or not 0 <= self.least <= 1:
            raise ValueError(f"{self}: expected a positive ridge and 0 <= least <= 1")


@dataclass(frozen=True)
class Periods:
    """How often what is refreshed, in updates.

    Args:
        inverses: T₃; the inverses are also refreshed at the updates in ``early``.
        early: update numbers (from 1) at which the statistics are too young to wait for T₃.
        statistics: after the first 20 updates the factors take in an estimate every so many updates.
    """

    inverses: int = 10
    early: tuple[int, ...] = (1, 2, 3, 5)
    statistics: int = 2

    def __post_init__(self) -> None:
        numbers = (self.inverses, self.statistics, *(self.early if isinstance(self.early, Iterable) else (self.early,)))
        if not isinstance(self.early, Iterable) or not all(isinstance(number, Integral) for number in numbers):
            raise TypeError(f"{self}: expected whole numbers of updates, early being several, such as (1, 2, 3)")
        if min(numbers) < 1:
            raise ValueError(f"{self}: expected inverses >= 1, statistics >= 1 and early >= 1, numbers of updates")

    def due(self, update: int) -> bool:
        """Whether the inverses are refreshed at this update (counted from 1)."""
        return update % self.inverses == 0 or update in self.early

    def observes(self, update: int) -> bool:
        """Whether the factors take in an estimate at this update (counted from 1)."""
        return update % self.statistics == 0 or update <= _EARLY_UPDATES


@dataclass(frozen=True)
class Renewal(Periods):
    """How often a `Preconditioner` renews what, in optimiser steps; the steps in ``early`` renew everything.

    Args:
        inverses: as in :class:`Periods`.
        early: as in :class:`Periods`.
        statistics: the factors are estimated anew every so many steps.
        rows: τ₁, the share of a batch's examples, its first ones, that an estimate is made from [KFAC, sec. 8]. The
            batch goes through the model as a whole; sums over inputs and derivatives, most of the cost where layers
            act at many positions, are those of these examples.
        positions: the share of an example's positions (columns of an image, elements of a sequence) that A is made of,
            one over a whole number n: every n-th one, which counts n times. Which of the n comes first changes from
            estimate to estimate, so that the average over n of them has seen all. G keeps all positions: it costs less.

    Raises:
        ValueError: a period below 1, or a share outside (0, 1].
    """

    inverses: int = 20
    statistics: int = 5
    rows: float = 1.0
    positions: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.positions <= 1 or abs(1 / self.positions - round(1 / self.positions)) > 1e-6:
            raise ValueError(f"Renewal(positions={self.positions}): expected one over a whole number, such as 1/4")
        if not 0 < self.rows <= 1:
            raise ValueError(f"Renewal(rows={self.rows}): expected a share of the examples, 0 < rows <= 1")

    def observes(self, update: int) -> bool:
        """Whether statistics are due at this step (counted from 1)."""
        return update % self.statistics == 0 or update in self.early

    def thinning(self, update: int) -> tuple[int, int]:
        """Every how many positions count in the estimate at this step (counted from 1), and the first of them."""
        every = round(1 / self.positions)
        return every, (update // self.statistics if update % self.statistics == 0 else update) % every


@dataclass(frozen=True)
class Subsets:
    """Which share of a batch's rows is used for what [KFAC, sec. 8].

    Args:
        factors: τ₁, the share whose sampled targets update the factors.
        curvature: τ₂, the share on which F Δ and ρ are computed; at least τ₁.
        minimum: use at least this many rows for either, where the batch has them.
        early: use at least this many in the first 20 updates, while the averages of the factors hold few estimates.
    """

    factors: float = 1 / 8
    curvature: float = 1 / 4
    minimum: int = 1
    early: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.factors <= self.curvature <= 1:
            raise ValueError(
                f"Subsets(factors={self.factors}, curvature={self.curvature}): expected 0 < factors <= curvature <= 1"
            )

    def at(self, update: int) -> "Subsets":
        """The subsets of one update (counted from 1)."""
        if update > _EARLY_UPDATES or self.early <= self.minimum:
            return self
        return replace(self, minimum=self.early)

    def rows(self, batch: int) -> tuple[int, int]:
        """How many rows of a batch serve the factors, and how many F Δ and ρ."""
        factors, curvature = (math.ceil(share * batch) for share in (self.factors, self.curvature))
        return min(batch, max(self.minimum, factors)), min(batch, max(self.minimum, curvature))


def published() -> dict[str, Any]:
    """The constants of [KFAC, sec. 6, 8, 13] as arguments of :class:`natgrad.KFAC`."""
    return {
        "damping": Damping(150.0, FactoredTikhonov(pi="trace"), LevenbergMarquardt(), GreedyGamma()),
        "subsets": Subsets(1 / 8, 1 / 4),
        "periods": Periods(inverses=20, early=(1, 2, 3), statistics=1),
        "guard": None,
        "decay": 0.95,
        "rescaling": Rescaling(layers=False),
    }
