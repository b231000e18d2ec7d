r"""An orthogonal matrix whose first columns are given, as a product of Householder reflections in compact form.

For orthonormal columns U ``[n, r]`` the reflections of their QR decomposition make ``Q = H₁ … H_r = I − Y T Yᵀ`` with
``Q [I; 0] = U diag(±1)``; the other columns of Q are as near to unit vectors as r reflections leave them. A product
with Q takes ``4 n r`` operations per column in the place of ``2 n²``. (Schreiber and Van Loan, SIAM J. Sci. Stat.
Comput. 10, 1989; ``T^{-1} = striu(Yᵀ Y) + ½ diag(Yᵀ Y)``: Puglisi, ibid. 13, 1992.)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Reflectors:
    """``Q = I − Y T Yᵀ``, orthogonal.

    Attributes:
        Y: ``[n, r]``, unit lower trapezoidal.
        YT: ``Y T``.
    """

    Y: Float[Tensor, "n r"]
    YT: Float[Tensor, "n r"]

    @classmethod
    def beginning_with(cls, U: Float[Tensor, "n r"]) -> "Reflectors":
        """Q with the orthonormal columns U first, up to their signs."""
        packed, _ = torch.geqrf(U)
        return cls.of(packed)

    @classmethod
    def of(cls, Y: Float[Tensor, "n r"]) -> "Reflectors":
        """Q from the vectors of its reflections, of which the part below the diagonal is read."""
        Y = Y.tril(-1).contiguous()  # by rows, so that products round alike when a checkpoint brings the numbers back
        Y.diagonal().fill_(1.0)
        gram = (Y.T @ Y).triu()
        gram.diagonal().mul_(0.5)
        return cls(Y, torch.linalg.solve_triangular(gram, Y, upper=True, left=False).contiguous())

    @property
    def dtype(self) -> torch.dtype:
        """In which products are taken."""
        return self.Y.dtype

    def to(self, dtype: torch.dtype) -> "Reflectors":
        """The same in another dtype."""
        return Reflectors(self.Y.to(dtype), self.YT.to(dtype))

    def left(self, V: Float[Tensor, "n k"], out: Tensor | None = None) -> Float[Tensor, "n k"]:
        """``Q V``."""
        return torch.addmm(V, self.YT, self.Y.T @ V, alpha=-1, out=out)

    def left_transposed(self, V: Float[Tensor, "n k"], out: Tensor | None = None) -> Float[Tensor, "n k"]:
        """``Qᵀ V``."""
        return torch.addmm(V, self.Y, self.YT.T @ V, alpha=-1, out=out)

    def right(self, V: Float[Tensor, "k n"], out: Tensor | None = None) -> Float[Tensor, "k n"]:
        """``V Q``."""
        return torch.addmm(V, V @ self.YT, self.Y.T, alpha=-1, out=out)

    def right_transposed(self, V: Float[Tensor, "k n"], out: Tensor | None = None) -> Float[Tensor, "k n"]:
        """``V Qᵀ``."""
        return torch.addmm(V, V @ self.Y, self.YT.T, alpha=-1, out=out)

    def leading(self) -> Float[Tensor, "n r"]:
        """Its first r columns."""
        columns = -(self.YT @ self.Y[: self.Y.shape[1]].T)
        columns.diagonal().add_(1.0)
        return columns

    def diagonal_of(self, M: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
        """``diag(Qᵀ M Q)`` of a symmetric M."""
        M_YT = M @ self.YT
        return M.diagonal() + (self.Y @ (self.YT.T @ M_YT)).sub_(M_YT, alpha=2).mul_(self.Y).sum(1)

    def to_dense(self) -> Float[Tensor, "n n"]:
        """Q itself."""
        Q = -(self.YT @ self.Y.T)
        Q.diagonal().add_(1.0)
        return Q
