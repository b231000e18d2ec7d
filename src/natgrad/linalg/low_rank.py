r"""A symmetric matrix as low rank plus a diagonal, and its damped inverse in the same form [KFAC, sec. 8].

``M ≈ U S Uᵀ + diag(d)`` with the leading eigenvectors U, found by subspace iteration from those of the matrix before,
and d what they leave on the diagonal. With ``D = d + damping`` (Woodbury)

.. math:: (U S U^T + D)^{-1} = D^{-1} - W W^T, \qquad W = D^{-1} U L^{-T} E (t^{-1} + I)^{-1/2},

where ``L Lᵀ = Uᵀ D^{-1} U`` and ``Lᵀ S L = E diag(t) Eᵀ``: the coordinates in which both parts are diagonal.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.linalg.spd import safe_eigh


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
        leading = self.leading(M, damping, start)
        return leading.inverse, leading.ok

    def leading(
        self, M: Float[Tensor, "n n"], damping: float | Tensor, start: DiagonalMinusLowRank | None = None
    ) -> "LeadingPart":
        """As :meth:`inverse`, with the coordinates in which the low-rank part is diagonal."""
        Q = _subspace(M, self.rank, self.steps, None if start is None else start.W / start.d[:, None])
        small = Q.T @ (M @ Q)
        small = 0.5 * (small + small.T)
        rest = (M.diagonal() - (Q @ small).mul_(Q).sum(1)).clamp_(min=0)
        d = (rest + damping).reciprocal()
        gram = (Q.T * d) @ Q
        L, info = torch.linalg.cholesky_ex(gram)
        t, E, found = safe_eigh(L.T @ small @ L)
        t = t.clamp(min=torch.finfo(M.dtype).eps)
        turned = torch.linalg.solve_triangular(L.T, E, upper=True) * (1 + t).rsqrt()
        W = (d[:, None] * Q) @ (turned * t.sqrt())
        ok = (info == 0) & found & torch.isfinite(W).all() & torch.isfinite(d).all() & (d > 0).all()
        return LeadingPart(DiagonalMinusLowRank(d, W), t, Q @ (gram @ turned), ok)


@dataclass(frozen=True)
class LeadingPart:
    r"""The low-rank part of ``M' = U S Uᵀ + diag(d)^{-1}`` in coordinates that whiten M', ``B = W diag(t)^{-1/2}``.

    ``Bᵀ M' B = I`` and ``M'^{-1} = diag(d) − B diag(t) Bᵀ``.

    Attributes:
        inverse: ``M'^{-1}``.
        t: positive.
        within: ``U Uᵀ B``, B's part in the leading subspace itself.
        ok: whether all of it can be used.
    """

    inverse: DiagonalMinusLowRank
    t: Float[Tensor, " rank"]
    within: Float[Tensor, "n rank"]
    ok: Bool[Tensor, ""]


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
    Q = _subspace(M, rank, steps, start)
    small = Q.T @ (M @ Q)
    if not bool(torch.isfinite(small).all()):  # eigh would raise
        return torch.full_like(Q, torch.nan), torch.full_like(small[0], torch.nan)
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    return Q @ vectors, values.clamp(min=0)


def _subspace(
    M: Float[Tensor, "n n"], rank: int, steps: int, start: Float[Tensor, "n rank"] | None
) -> Float[Tensor, "n rank"]:
    """Orthonormal columns that span about what the leading eigenvectors span."""
    if start is None or start.shape[1] != rank or not bool(torch.isfinite(start).all()):
        start, steps = M[:, M.diagonal().topk(rank).indices], steps + 2
    for _ in range(steps):
        start = torch.linalg.qr(M @ start).Q
    return start
