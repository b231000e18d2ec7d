r"""A symmetric matrix as low rank plus a diagonal, and its damped inverse in the same form [KFAC, sec. 8].

``M ≈ U S Uᵀ + diag(d)`` with the leading eigenvectors U, found by subspace iteration from those of the matrix before,
and d what they leave on the diagonal. With ``D = d + damping`` (Woodbury)

.. math:: (U S U^T + D)^{-1} = D^{-1} - W W^T, \qquad W = D^{-1} U L^{-T}, \quad L L^T = S^{-1} + U^T D^{-1} U.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class DiagonalMinusLowRank:
    """``diag(d) − W Wᵀ``, applied in O(n rank) operations per column.

    Attributes:
        d: ``[n]``.
        W: ``[n, rank]``.
    """

    d: Float[Tensor, " n"]
    W: Float[Tensor, "n rank"]

    def left(self, V: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The matrix times V."""
        return torch.addmm(self.d[:, None] * V, self.W, self.W.T @ V, alpha=-1)

    def right(self, V: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """V times the matrix."""
        return torch.addmm(V * self.d, V @ self.W, self.W.T, alpha=-1)

    def to_dense(self) -> Float[Tensor, "n n"]:
        """The matrix itself."""
        return torch.diag(self.d) - self.W @ self.W.T


@dataclass(frozen=True)
class LowRank:
    """How to find the low-rank part: its rank, and how many steps of subspace iteration.

    Args:
        rank: of U; a factor that is not at least twice as large is inverted as a whole.
        steps: with a warm start one is enough where the matrix changes slowly; without one it is two more.

    Raises:
        ValueError: a setting out of range.
    """

    rank: int
    steps: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1:
            raise ValueError(f"{self}: expected rank >= 1 and steps >= 1")

    def applies(self, n: int) -> bool:
        """Whether a matrix of this size is large enough."""
        return n >= 2 * self.rank

    def inverse(
        self, M: Float[Tensor, "n n"], damping: float | Tensor, start: DiagonalMinusLowRank | None = None
    ) -> tuple[DiagonalMinusLowRank, Bool[Tensor, ""]]:
        """The damped inverse and whether it can be used.

        Args:
            M: symmetric positive semi-definite.
            damping: the coefficient of the identity; positive.
            start: that of an earlier M, whose subspace is the first guess.
        """
        U, values = leading_subspace(M, self.rank, self.steps, None if start is None else start.W / start.d[:, None])
        rest = (M.diagonal() - (U.square() * values).sum(1)).clamp_(min=0)
        d = (rest + damping).reciprocal()
        core = (U.T * d) @ U
        core.diagonal().add_(values.clamp(min=torch.finfo(M.dtype).tiny).reciprocal())
        L, info = torch.linalg.cholesky_ex(core)
        W = torch.linalg.solve_triangular(L, (d[:, None] * U).T, upper=False).T.contiguous()
        ok = (info == 0) & torch.isfinite(W).all() & torch.isfinite(d).all() & (d > 0).all()
        return DiagonalMinusLowRank(d, W), ok


def leading_subspace(
    M: Float[Tensor, "n n"], rank: int, steps: int, start: Float[Tensor, "n rank"] | None = None
) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " rank"]]:
    """Approximate leading eigenvectors (orthonormal columns) and eigenvalues of a symmetric M, by subspace iteration.

    Args:
        M: symmetric positive semi-definite.
        rank: how many.
        steps: products of M with the subspace; two more without a start.
        start: a basis of the first guess; by default the columns of M with the largest diagonal entries.
    """
    if start is None or start.shape[1] != rank or not bool(torch.isfinite(start).all()):
        start, steps = M[:, M.diagonal().topk(rank).indices], steps + 2
    Q = torch.linalg.qr(start).Q
    for _ in range(steps):
        Q = torch.linalg.qr(M @ Q).Q
    small = Q.T @ (M @ Q)
    if not bool(torch.isfinite(small).all()):  # eigh would raise
        return torch.full_like(Q, torch.nan), torch.full_like(small[0], torch.nan)
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    return Q @ vectors, values.clamp(min=0)
