r"""Inverses of slowly changing matrices from the inverse before: a few matrix products [KFAC, sec. 8].

Newton's iteration for the inverse (Hotelling, Schulz; Pan and Schreiber 1991): ``X ← X + X (I − M X)`` squares the
residual ``I − M X`` at every step. It converges exactly where the residual's eigenvalues are below 1 in absolute value.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.spd import SPDResult, spd_inverse

# Products with vectors that bound the residual's largest eigenvalue from below, before anything else is done.
_POWER_STEPS = 6


@dataclass(frozen=True)
class NewtonSchulz:
    r"""``(M + damping I)^{-1}``, warm-started from an inverse of an earlier M; else by Cholesky.

    The warm start is tried where the residual's largest eigenvalue, estimated by products with one vector, would fall
    below the tolerance within ``iterations`` steps; the result is checked by its residual and replaced by the
    Cholesky inverse where it misses. 2k + 1 matrix products for k steps: it pays where matrix products run much faster
    than factorisations.

    Args:
        iterations: at most so many steps.
        tolerance: on ``‖I − M X‖_F / √n``.

    Raises:
        ValueError: a setting out of range.
    """

    iterations: int = 3
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.tolerance < 1:
            raise ValueError(f"{self}: expected iterations >= 1 and a tolerance between 0 and 1")

    def inverse(
        self, M: Float[Tensor, "n n"], damping: float | Tensor, start: Float[Tensor, "n n"] | None
    ) -> SPDResult:
        """(inverse, ok) as :func:`natgrad.linalg.spd_inverse`.

        Args:
            M: symmetric positive semi-definite.
            damping: the coefficient of the identity.
            start: the inverse of a matrix near to ``M + damping I``, or None.
        """
        if start is None or start.shape != M.shape or start.dtype != M.dtype:
            return spd_inverse(M, damping)
        found = warm_inverse(M, damping, start, self.iterations, self.tolerance)
        return spd_inverse(M, damping) if found is None else SPDResult(found, M.new_ones((), dtype=torch.bool))


def warm_inverse(
    M: Float[Tensor, "n n"], damping: float | Tensor, start: Float[Tensor, "n n"], iterations: int, tolerance: float
) -> Float[Tensor, "n n"] | None:
    """``(M + damping I)^{-1}`` by Newton's iteration from ``start``; None where it would not get there in time."""
    n = M.shape[0]
    damped = M.clone()
    damped.diagonal().add_(damping)
    radius = _residual_radius(damped, start)
    if not (radius < 1 and radius ** (2**iterations) < tolerance):  # also where it is NaN
        return None
    X, residual = start, damped @ start
    for step in range(iterations + 1):
        residual.neg_().diagonal().add_(1.0)
        if bool(residual.norm() < tolerance * n**0.5):
            return 0.5 * (X + X.T)
        if step < iterations:
            X = torch.addmm(X, X, residual)
            torch.mm(damped, X, out=residual)
    return None


def _residual_radius(M: Float[Tensor, "n n"], X: Float[Tensor, "n n"]) -> float:
    """A lower estimate of the largest ``|eigenvalue|`` of ``I − M X``, by the power method from a fixed vector."""
    n = M.shape[0]
    v = torch.linspace(1.0, 2.0, n, dtype=M.dtype, device=M.device)
    v[1::2] *= -1  # neither smooth nor near to the constant
    v /= v.norm()
    radius = v.new_zeros(())
    for _ in range(_POWER_STEPS):
        w = v - M @ (X @ v)
        radius = w.norm()
        v = w / radius.clamp(min=torch.finfo(M.dtype).tiny)
    return float(radius)
