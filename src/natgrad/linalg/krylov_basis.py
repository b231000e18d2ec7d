"""An orthonormal basis of a Krylov subspace, and the matrix on it (O. Vinyals, D. Povey, AISTATS 2012, algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.spd import safe_eigh


@dataclass(frozen=True)
class KrylovBasis:
    """Orthonormal columns V, and ``Vᵀ A V``.

    Args:
        vectors: V; a column is zero where the subspace was exhausted before it.
        matrix: ``Vᵀ A V``, symmetric, in float64 where the device has it.
    """

    vectors: Float[Tensor, "n k"]
    matrix: Float[Tensor, "k k"]

    @property
    def rank(self) -> int:
        """The dimension of the subspace."""
        return int(self.vectors.any(0).sum())

    def whitened(self, floor: float = 1e-4) -> Float[Tensor, "n k"]:
        """``V Q diag(e)^{-1/2}`` with ``Vᵀ A V = Q diag(e) Qᵀ``: coordinates in which A is the identity.

        Args:
            floor: eigenvalues below this share of the largest are raised to it.
        """
        values, Q, _ = safe_eigh(self.matrix, what="the matrix on the subspace")
        largest = values.abs().max()
        raised = torch.where(largest > 0, torch.maximum(values, floor * largest), 1.0)
        return self.vectors @ (Q * raised.rsqrt()).to(self.vectors.dtype)


def krylov_basis(
    matvec: Callable[[Tensor], Tensor],
    b: Float[Tensor, " n"],
    size: int,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    extra: Float[Tensor, " n"] | None = None,
) -> KrylovBasis:
    """A basis of ``span{M^{-1} b, (M^{-1} A) M^{-1} b, …, (M^{-1} A)^{size−1} M^{-1} b, extra}``.

    Every vector is orthogonalised twice against all before it, so that rounding leaves no trace of them.

    Args:
        matvec: ``v → A v`` for a symmetric A.
        b: where the subspace starts.
        size: its dimension without ``extra``; as many products with A are made, and one more for ``extra``.
        preconditioner: ``r → M^{-1} r``; default the identity.
        extra: a direction to add, such as the step before.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: expected at least one dimension")
    precondition = preconditioner or (lambda r: r)
    columns = size + (extra is not None)
    V = b.new_zeros(columns, len(b))
    AV = torch.zeros_like(V)
    w = precondition(b)
    largest = w.new_zeros(())  # of the products: the rounding errors of all are in proportion to it
    for i in range(columns):
        if i == size and extra is not None:
            w, largest = extra, torch.zeros_like(largest)
        V[i] = _orthonormal(w, V[:i], largest)
        AV[i] = matvec(V[i])
        w = precondition(AV[i])
        largest = torch.maximum(largest, torch.linalg.vector_norm(w))
    real = torch.float32 if b.device.type == "mps" else torch.float64
    matrix = (V @ AV.T).to(real)
    return KrylovBasis(V.T, (matrix + matrix.T) / 2)


def _orthonormal(w: Float[Tensor, " n"], V: Float[Tensor, "i n"], largest: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    """W made orthogonal to the rows of V and of unit length; zero where nothing but rounding is left of it."""
    before = torch.linalg.vector_norm(w)
    for _ in range(2):
        w = w - V.T @ (V @ w)
    after = torch.linalg.vector_norm(w)
    # scaled twice: a tiny w has a norm whose square underflows
    enough = after > 10 * torch.finfo(w.dtype).eps * torch.maximum(len(w) ** 0.5 * before, largest)
    return torch.where(enough, w / after, torch.zeros_like(w))
