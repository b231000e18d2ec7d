"""Settings of the optimisers that solve or search within a step, and the diagonal preconditioner of Martens (2010)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.per_example import PerExampleGradients
from natgrad.likelihoods import Likelihood, is_plain_sum
from natgrad.linalg import RelativeProgress
from natgrad.model_view import batch_size, select_rows
from natgrad.optim.arguments import check_whole

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class InnerSolve:
    """How Hessian-free solves for its step (J. Martens, "Deep learning via Hessian-free optimization", ICML 2010).

    Args:
        max_iters: at most so many products with the curvature. The paper allows some hundreds; with batches of 1000 to
            2000, 30 reach the same error in less time than 50 or 100 (``docs/log.md``).
        progress: stop where the quadratic model hardly falls any more [sec. 4.4]; None runs all iterations.
        warm_start: ζ: start from ζ times the solution of the step before [sec. 4.5]; 0 starts from zero.
        exponent: of the diagonal preconditioner ``(Σ g² + λ)^exponent`` [sec. 4.7]; 0 for none.
        store: factor between the iterations whose iterates are kept [sec. 4.6]; the one from which going back does not
            lower the loss is taken. None takes the last iterate.
    """

    max_iters: int = 30
    progress: RelativeProgress | None = RelativeProgress()
    warm_start: float = 0.95
    exponent: float = 0.75
    store: float | None = 1.3

    def __post_init__(self) -> None:
        check_whole(max_iters=self.max_iters)
        if self.max_iters < 1:
            raise ValueError(f"InnerSolve(max_iters={self.max_iters}): expected at least one iteration")
        for name in ("warm_start", "exponent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"InnerSolve({name}={getattr(self, name)}): expected a number from 0 to 1")
        if self.store is not None and not self.store > 1:
            raise ValueError(f"InnerSolve(store={self.store}): expected a factor above 1, such as 1.3, or None")


@dataclass(frozen=True)
class LineSearch:
    """Backtracking until ``h(θ + α δ) ≤ h(θ) + slope α ∇h·δ`` (Martens 2010, sec. 4.8).

    Args:
        shrink: what α is multiplied by, from 1 on.
        slope: the share of the first-order decrease that is enough.
        trials: after so many the step is rejected.
    """

    shrink: float = 0.8
    slope: float = 0.01
    trials: int = 20

    def __post_init__(self) -> None:
        check_whole(trials=self.trials)
        if not 0 < self.shrink < 1 or not 0 <= self.slope < 1 or self.trials < 1:
            raise ValueError(f"{self}: expected 0 < shrink < 1, 0 <= slope < 1 and trials >= 1")

    def __call__(
        self, value: Callable[[float], float], start: float, first: float, slope: float
    ) -> tuple[float, float]:
        """α, and h there; (0, start) where no trial is good enough.

        Args:
            value: h(θ + α δ) as a function of α.
            start: h(θ).
            first: h(θ + δ), where it is known already.
            slope: ∇h·δ.
        """
        alpha, now = 1.0, first
        for _ in range(self.trials):
            if math.isfinite(now) and now <= start + self.slope * alpha * min(slope, 0.0):
                return alpha, now
            alpha *= self.shrink
            now = value(alpha)
        return 0.0, start


class DiagonalPreconditioner:
    """``M = (Σ_n g_n² / count + λ)^exponent``, the diagonal of the empirical Fisher, damped (Martens 2010, sec. 4.7).

    Args:
        collect: of per-example gradients.
        likelihood: p(y|z).
        batches: (inputs, targets) micro-batches.
    """

    def __init__(
        self, collect: PerExampleGradients, likelihood: Likelihood, batches: Sequence[tuple[Any, Any]]
    ) -> None:
        squares: Tensor | None = None
        counts = []
        for x, y in batches:
            for start in range(0, batch_size(x), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                passed = collect(likelihood, select_rows(x, part), select_rows(y, part))
                found = passed.rows.squares()
                squares = found if squares is None else squares.add_(found)
                counts.append(torch.as_tensor(likelihood.count(passed.z, select_rows(y, part)), dtype=found.dtype))
        assert squares is not None  # there is at least one batch
        count = counts[0] if is_plain_sum(likelihood) else torch.stack(counts).sum()
        self.diagonal: Float[Tensor, " P"] = squares / count

    def inverse(self, damping: Float[Tensor, ""], exponent: float) -> Callable[[Tensor], Tensor]:
        """``r → M^{-1} r``."""
        scale = (self.diagonal + damping.to(self.diagonal.dtype)).pow_(-exponent)
        return lambda r: r * scale
