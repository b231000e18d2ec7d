"""The inverse of one damped block as its factors: whole, or of low rank plus a diagonal."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.curvature.base import kron_blocks
from natgrad.linalg.low_rank import DiagonalMinusLowRank


class BlockInverse(Protocol):
    """The inverse of a damped block; never changes."""

    @property
    def ok(self) -> Bool[Tensor, ""]:
        """Whether the inverse can be used: False where the factors were not finite or not definite."""
        ...

    def apply(self, V: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """The inverse times vec(V), as a matrix shaped like V."""
        ...

    def to_dense(self) -> Float[Tensor, "size size"]:
        """The matrix that acts on the stacked columns of V."""
        ...


@runtime_checkable
class WritesNegative(Protocol):
    """An inverse that can write its negative product where it is wanted."""

    def write_negative(self, V: Tensor, into: Tensor) -> None:
        """Minus the inverse times vec(V), written to a buffer shaped like V."""
        ...


@dataclass(frozen=True)
class FactoredInverse:
    r"""``(A + π γ I)^{-1} ⊗ (G + γ/π I)^{-1}`` [KFAC, sec. 6.3, eq. 7]; a vector stands for a diagonal factor.

    Applying it is two matrix products, one with a diagonal factor.
    """

    A: Tensor
    G: Tensor
    ok: Bool[Tensor, ""]

    def apply(self, V: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """``(G + γ/π I)^{-1} V (A + π γ I)^{-1}``."""
        return times_right(self.A, times_left(self.G, V.to(self.G.dtype))).to(V.dtype)

    def write_negative(self, V: Float[Tensor, "out columns"], into: Float[Tensor, "out columns"]) -> None:
        """Minus :meth:`apply`, written to a buffer without passes over memory of its own."""
        if self.A.ndim != 2 or V.dtype != self.A.dtype:
            torch.neg(self.apply(V), out=into)
        else:
            torch.addmm(into, times_left(self.G, V), self.A, beta=0, alpha=-1, out=into)

    def to_dense(self) -> Float[Tensor, "size size"]:
        """The matrix that acts on the stacked columns of V."""
        return kron_blocks(*map(_matrix, (self.A, self.G)))


@dataclass(frozen=True)
class SolvedInverse:
    """As :class:`FactoredInverse`, with the Cholesky factor L of ``A + π γ I``: two solves in place of a product.

    For an inverse that is used once: to write it out takes as long as several products.
    """

    L: Float[Tensor, "columns columns"]
    G: Tensor
    ok: Bool[Tensor, ""]

    def apply(self, V: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """``(G + γ/π I)^{-1} V (L Lᵀ)^{-1}``."""
        U = times_left(self.G, V.to(self.G.dtype)).to(self.L.dtype)
        U = torch.linalg.solve_triangular(self.L.mT, U, upper=True, left=False)
        return torch.linalg.solve_triangular(self.L, U, upper=False, left=False).to(V.dtype)

    def written_out(self) -> FactoredInverse:
        """The same with the inverse of A as a matrix."""
        return FactoredInverse(torch.cholesky_inverse(self.L).mT.to(self.G.dtype), self.G, self.ok)

    def to_dense(self) -> Float[Tensor, "size size"]:
        """The matrix that acts on the stacked columns of V."""
        return self.written_out().to_dense()


@dataclass(frozen=True)
class LowRankInverse:
    """As :class:`FactoredInverse`, with inverses of factors as a diagonal minus a product of low rank [KFAC, sec. 8].

    Args:
        A: such an inverse; a matrix for a factor that is too small for the rank, a vector for a diagonal one.
        G: likewise.
        ok: whether it can be used.
    """

    A: Tensor | DiagonalMinusLowRank
    G: Tensor | DiagonalMinusLowRank
    ok: Bool[Tensor, ""]

    @property
    def shape(self) -> torch.Size:
        """That of the matrices V that it acts on; a stack of them for a stack of factors."""
        A, G = (x.d if isinstance(x, DiagonalMinusLowRank) else x for x in (self.A, self.G))
        return torch.Size((*G.shape[:-2], G.shape[-1], A.shape[-1]))

    def apply(self, V: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """``(G + γ/π I)^{-1} V (A + π γ I)^{-1}``."""
        A, G = self.A, self.G
        dtype = G.d.dtype if isinstance(G, DiagonalMinusLowRank) else G.dtype
        U = G.left(V.to(dtype)) if isinstance(G, DiagonalMinusLowRank) else times_left(G, V.to(dtype))
        return (A.right(U) if isinstance(A, DiagonalMinusLowRank) else times_right(A, U)).to(V.dtype)

    def write_negative(self, V: Float[Tensor, "out columns"], into: Float[Tensor, "out columns"]) -> None:
        """Minus :meth:`apply`, written to a buffer without passes over memory of its own."""
        A, G = self.A, self.G
        if not isinstance(A, DiagonalMinusLowRank) or V.dtype != A.d.dtype:
            torch.neg(self.apply(V), out=into)
            return
        if isinstance(G, DiagonalMinusLowRank):
            torch.mul(G.d[:, None], V, out=into).addmm_(G.W, G.W.T @ V, alpha=-1)
        else:
            torch.mul(G[:, None], V, out=into) if G.ndim == 1 else torch.mm(G, V, out=into)
        inner = into @ A.W
        into.mul_(-A.d).addmm_(inner, A.W.T)

    def to_dense(self) -> Float[Tensor, "size size"]:
        """The matrix that acts on the stacked columns of V."""
        A, G = (x.to_dense() if isinstance(x, DiagonalMinusLowRank) else _matrix(x) for x in (self.A, self.G))
        return kron_blocks(A, G)


def inverse_of(
    A: Tensor | DiagonalMinusLowRank, G: Tensor | DiagonalMinusLowRank, ok: Bool[Tensor, ""]
) -> LowRankInverse | FactoredInverse:
    """The inverse of a block from those of its factors, where either may be of low rank."""
    plain = isinstance(A, Tensor) and isinstance(G, Tensor)
    return FactoredInverse(A, G, ok) if plain else LowRankInverse(A, G, ok)


def _matrix(M: Tensor) -> Tensor:
    return torch.diag(M) if M.ndim == 1 else M


def times_left(G: Tensor, V: Tensor) -> Tensor:
    """``G V``; a vector G stands for a diagonal matrix."""
    return G[:, None] * V if G.ndim == 1 else G @ V


def times_right(A: Tensor, V: Tensor) -> Tensor:
    """``V A``; a vector A stands for a diagonal matrix."""
    return V * A if A.ndim == 1 else V @ A
