r"""``(A ⊗ B ± C ⊗ D)^{-1}``: the generalised Stein equation ``B U Aᵀ ± D U Cᵀ = V`` [KFAC, app. B].

All four matrices are symmetric; vec stacks columns, so that ``(A ⊗ B) vec(V) = vec(B V Aᵀ)`` for V of shape
``[size of B, size of A]``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from natgrad.linalg.spd import safe_cholesky, safe_eigh

Method = Literal["decomposition", "smith"]

# Relative to the largest entry; matrices that were made in single precision pass, in whatever dtype they come.
_SYMMETRIC_UP_TO = 1e-4
# So many squarings stand for 2^48 Smith iterations: what has not converged by then does not in any useful sense.
_MOST_SQUARINGS = 48


class PairEigh(NamedTuple):
    """K and s with ``Kᵀ A K = I`` and ``Kᵀ C K = diag(s)``, and whether they can be used (a 0-d bool tensor)."""

    K: Float[Tensor, "n n"]
    s: Float[Tensor, " n"]
    ok: Bool[Tensor, ""]


def pair_eigh(
    A: Float[Tensor, "n n"] | float, C: Float[Tensor, "n n"], *, check: bool = False, what: str = "A"
) -> PairEigh:
    r"""Diagonalise two symmetric matrices together: ``Kᵀ A K = I``, ``Kᵀ C K = diag(s)``.

    ``K = L^{-T} E`` with ``A = L Lᵀ`` and ``L^{-1} C L^{-T} = E diag(s) Eᵀ``; the paper's ``A^{-1/2} E₁`` is another
    such K, at the price of one more decomposition.

    Args:
        A: positive definite; a number stands for that multiple of the identity.
        C: symmetric.
        check: raise instead of returning ``ok = False``.
        what: how an error names A.

    Returns:
        (K, s ascending, ok). Where ``ok`` is False, K and s mean nothing.

    Raises:
        ValueError: with ``check``, when A is not positive definite or C is not finite.
    """
    if not isinstance(A, Tensor) or A.ndim == 0:
        scale = float(A)
        if check and not 0 < scale < math.inf:
            raise ValueError(f"{what}={scale:g}: expected a positive multiple of the identity")
        values, E, ok = safe_eigh(C, check=check, what="its partner")
        return PairEigh(E / scale**0.5, values / scale, ok)
    L, ok = safe_cholesky(A, check=check, what=what)
    half = torch.linalg.solve_triangular(L, C, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    values, E, found = safe_eigh(whitened, check=check, what=f"the partner of {what}")
    return PairEigh(torch.linalg.solve_triangular(L.mT, E, upper=True), values, ok & found)


@dataclass(frozen=True)
class KroneckerSum:
    r"""``A ⊗ B + sign · C ⊗ D`` for symmetric matrices, and its inverse [KFAC, app. B].

    ``op @ v`` takes ``[n]`` or ``[n, k]``, n the product of the two sizes; ``op.apply(V)`` a matrix
    ``V [size of B, size of A]``.

    Args:
        A: positive definite, ``[a, a]``; a number stands for that multiple of the identity.
        B: positive definite, ``[b, b]``; likewise.
        C: symmetric, ``[a, a]``.
        D: symmetric, ``[b, b]``.
        sign: +1 or -1.

    Raises:
        TypeError: C or D is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit, or another sign.
    """

    A: Float[Tensor, "a a"] | float
    B: Float[Tensor, "b b"] | float
    C: Float[Tensor, "a a"]
    D: Float[Tensor, "b b"]
    sign: int = 1

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ValueError(f"sign={self.sign!r}: expected +1 or -1")
        for name, matrix, partner in (("C", self.C, "A"), ("D", self.D, "B")):
            if not isinstance(matrix, Tensor):
                raise TypeError(f"{name}: expected a square matrix as a tensor, got {type(matrix).__name__}")
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"{name}: expected a square matrix, got shape {list(matrix.shape)}")
            if not matrix.is_floating_point():
                raise ValueError(f"{name}: expected real floating-point numbers, got {matrix.dtype}; use .double()")
            first = getattr(self, partner)
            if not isinstance(first, Tensor | int | float):
                raise TypeError(
                    f"{partner}: expected a square matrix as a tensor, or a number for that multiple of the identity, "
                    f"got {type(first).__name__}"
                )
            if isinstance(first, Tensor) and first.ndim and first.shape != matrix.shape:
                raise ValueError(
                    f"{partner}: expected the shape of {name}, {list(matrix.shape)}, got {list(first.shape)}"
                )
            for other in (first, self.D):
                if isinstance(other, Tensor) and (other.dtype, other.device) != (matrix.dtype, matrix.device):
                    raise ValueError(
                        f"KroneckerSum: expected matrices of one dtype and device, got {name} in {matrix.dtype} on "
                        f"{matrix.device} beside {other.dtype} on {other.device}"
                    )

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        n = self.C.shape[0] * self.D.shape[0]
        return torch.Size((n, n))

    def apply(self, V: Float[Tensor, "*batch b a"]) -> Float[Tensor, "*batch b a"]:
        """``B V Aᵀ ± D V Cᵀ``."""
        return self._times(self.B, V, self.A) + self.sign * (self.D @ V @ self.C.mT)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector ``[n]`` or with the columns of ``[n, k]``."""
        return _on_columns(self.apply, v, self.D.shape[0], self.C.shape[0], self.C.dtype)

    def to_dense(self) -> Float[Tensor, "n n"]:
        """The matrix itself."""
        A, B = _matrix(self.A, self.C), _matrix(self.B, self.D)
        return torch.kron(A, B) + self.sign * torch.kron(self.C.contiguous(), self.D.contiguous())

    def inverse(self, method: Method = "decomposition", *, clip: float | None = None) -> "KroneckerSumInverse":
        r"""``(A ⊗ B ± C ⊗ D)^{-1}``: an object with ``@``, ``apply`` and ``to_dense``.

        Everything that costs a decomposition is done here, a product is a few matrix products.

        Args:
            method: ``"decomposition"``: ``K₂ [(K₂ᵀ V K₁) / (1 1ᵀ ± s₂ s₁ᵀ)] K₁ᵀ``. ``"smith"``: the fixed-point
                iteration ``U ← B^{-1} V A^{-1} ∓ (B^{-1} D) U (C A^{-1})``, 2^j steps by j squarings; it converges
                only where ``max |s₁ s₂| < 1``, for either sign, and otherwise the decomposition takes its place (see
                the result's ``method``).
            clip: raise the eigenvalues ``1 ± s₁ s₂`` to at least this positive number and count them in ``clipped``,
                instead of refusing a matrix that is not positive definite. Decomposition only.

        Raises:
            ValueError: a matrix is not symmetric; A or B is not positive definite; the sum is not positive definite to
                working precision and there is no ``clip``; an unknown method, or a clip that is not positive.
        """
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: expected 'decomposition' or 'smith'")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip}: expected a positive number, the least eigenvalue relative to A ⊗ B")
        self._check_symmetric()
        if method == "smith":
            found = self._smith()
            if found is not None:
                return found
        K1, s1, _ = pair_eigh(self.A, self.C, check=True, what="A")
        K2, s2, _ = pair_eigh(self.B, self.D, check=True, what="B")
        return self._divided(K1, K2, s1, s2, clip)

    def _check_symmetric(self) -> None:
        """Decompositions read one triangle: the other half of a matrix that is not symmetric would be lost unseen."""
        for name in ("A", "B", "C", "D"):
            M = getattr(self, name)
            if not isinstance(M, Tensor) or M.ndim == 0:
                continue
            largest, difference = (float(values.abs().max()) for values in (M, M - M.mT))
            if difference > _SYMMETRIC_UP_TO * largest:
                raise ValueError(
                    f"{name}: expected a symmetric matrix; {name} and its transpose differ by up to {difference:.1e}, "
                    f"its largest entry being {largest:.1e}; where that is rounding, pass ({name} + {name}.T) / 2"
                )

    def _divided(self, K1: Tensor, K2: Tensor, s1: Tensor, s2: Tensor, clip: float | None) -> "Decomposed":
        divisor = 1 + self.sign * torch.outer(s2, s1)
        floor = 10 * torch.finfo(divisor.dtype).eps * max(divisor.shape) if clip is None else clip
        below = divisor < floor
        if clip is None and below.any():
            raise ValueError(
                f"A ⊗ B {'+' if self.sign > 0 else '-'} C ⊗ D is not positive definite to working precision: "
                f"relative to A ⊗ B its smallest eigenvalue is {float(divisor.min()):.1e}; damp A and B, or pass "
                "clip=, for example clip=1e-6, to raise such eigenvalues"
            )
        return Decomposed(K1, K2, s1, s2, divisor.clamp_(min=floor), below.sum())

    def _smith(self) -> "Smith | None":
        """The powers that the squaring trick needs, or None where the iteration does not converge."""
        sides = []
        for matrix, partner, what in ((self.A, self.C, "A"), (self.B, self.D, "B")):
            L, _ = safe_cholesky(_matrix(matrix, partner), check=True, what=what)
            half = torch.linalg.solve_triangular(L, partner, upper=False)
            sides.append((L, torch.linalg.solve_triangular(L, half.mT, upper=False)))
        (L1, right), (L2, left) = sides
        powers: list[tuple[Tensor, Tensor]] = []
        resolution = torch.finfo(left.dtype).eps
        for _ in range(_MOST_SQUARINGS):
            norm_left, norm_right = left.norm(), right.norm()  # bound the largest |s₂| and |s₁| of this power
            bound = float(norm_left * norm_right)
            if bound <= resolution:
                return Smith(L1, L2, tuple(powers), self.sign)
            if not math.isfinite(bound) or not norm_right > 0 or not norm_left > 0:
                return None
            balance = (norm_right / norm_left).sqrt()  # keeps both sides' powers in range; their product stays
            left, right = left * balance, right / balance
            powers.append((left, right))
            left, right = left @ left, right @ right
        return None

    @staticmethod
    def _times(B: Tensor | float, V: Tensor, A: Tensor | float) -> Tensor:
        V = B @ V if isinstance(B, Tensor) and B.ndim else V * B
        return V @ A.mT if isinstance(A, Tensor) and A.ndim else V * A


class KroneckerSumInverse:
    """What the two methods share: ``@``, ``apply``, ``to_dense``.

    Attributes:
        method: ``"decomposition"`` or ``"smith"``.
        clipped: how many eigenvalues were raised, a 0-d tensor.
    """

    method: Method
    clipped: Int[Tensor, ""]
    sizes: tuple[int, int]
    dtype: torch.dtype

    def apply(self, V: Float[Tensor, "*batch b a"]) -> Float[Tensor, "*batch b a"]:
        """U with ``B U A ± D U C = V``."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        n = math.prod(self.sizes)
        return torch.Size((n, n))

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector ``[n]`` or with the columns of ``[n, k]``."""
        return _on_columns(self.apply, v, *self.sizes, self.dtype)

    def to_dense(self) -> Float[Tensor, "n n"]:
        """The matrix itself."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.clipped.device)


class Decomposed(KroneckerSumInverse):
    r"""``(K₁ ⊗ K₂) (I ⊗ I ± S₁ ⊗ S₂)^{-1} (K₁ᵀ ⊗ K₂ᵀ)``: four matrix products and a division.

    Args:
        K1: ``K₁ᵀ A K₁ = I``.
        K2: ``K₂ᵀ B K₂ = I``.
        s1: diagonal of ``K₁ᵀ C K₁``.
        s2: diagonal of ``K₂ᵀ D K₂``.
        divisor: ``1 ± s₂ s₁ᵀ``, positive.
        clipped: how many of its entries were raised.
    """

    method: Method = "decomposition"

    def __init__(self, K1: Tensor, K2: Tensor, s1: Tensor, s2: Tensor, divisor: Tensor, clipped: Tensor) -> None:
        self.K1, self.K2, self.s1, self.s2 = K1, K2, s1, s2
        self.divisor, self.clipped = divisor, clipped
        self.sizes, self.dtype = (divisor.shape[0], divisor.shape[1]), divisor.dtype

    def apply(self, V: Float[Tensor, "*batch b a"]) -> Float[Tensor, "*batch b a"]:
        """``K₂ [(K₂ᵀ V K₁) / (1 1ᵀ ± s₂ s₁ᵀ)] K₁ᵀ``."""
        return self.K2 @ ((self.K2.mT @ V @ self.K1) / self.divisor) @ self.K1.mT


class Smith(KroneckerSumInverse):
    r"""``U = Σ_j (∓1)^j X^j V' Y^j`` in whitened coordinates, by squaring: j products for 2^j terms.

    Args:
        L1: Cholesky factor of A.
        L2: Cholesky factor of B.
        powers: ``(X^(2^j), Y^(2^j))`` for j = 0, 1, …, with ``X = L₂^{-1} D L₂^{-T}`` and Y likewise of C.
        sign: of the sum.
    """

    method: Method = "smith"

    def __init__(self, L1: Tensor, L2: Tensor, powers: tuple[tuple[Tensor, Tensor], ...], sign: int) -> None:
        self.L1, self.L2, self.powers, self.sign = L1, L2, powers, sign
        self.clipped = torch.zeros((), dtype=torch.int64, device=L1.device)
        self.sizes, self.dtype = (L2.shape[0], L1.shape[0]), L1.dtype

    def apply(self, V: Float[Tensor, "*batch b a"]) -> Float[Tensor, "*batch b a"]:
        """U with ``B U A ± D U C = V``, to working precision."""
        solve = torch.linalg.solve_triangular
        U = solve(self.L1.mT, solve(self.L2, V, upper=False), upper=True, left=False)
        for j, (left, right) in enumerate(self.powers):
            term = left @ U @ right
            U = U - term if j == 0 and self.sign > 0 else U + term
        return solve(self.L1, solve(self.L2.mT, U, upper=True), upper=False, left=False)


def _matrix(A: Tensor | float, like: Tensor) -> Tensor:
    """A, a multiple of the identity written out."""
    return A.contiguous() if isinstance(A, Tensor) and A.ndim else torch.diag(torch.full_like(like[0], float(A)))


def _on_columns(apply: Callable[[Tensor], Tensor], v: Tensor, b: int, a: int, dtype: torch.dtype) -> Tensor:
    """A map of matrices ``[b, a]`` on stacked columns, ``[n]`` or ``[n, k]``."""
    n = a * b
    if not isinstance(v, Tensor):
        return NotImplemented
    if v.ndim not in (1, 2) or v.shape[0] != n:
        raise ValueError(f"KroneckerSum @ v: expected v of shape [{n}] or [{n}, k], got {list(v.shape)}")
    if v.dtype != dtype:
        raise ValueError(f"KroneckerSum @ v: expected v of dtype {dtype}, got {v.dtype}; convert it with .to()")
    V = (v.mT.reshape(-1, a, b) if v.ndim == 2 else v.reshape(a, b)).mT
    U = apply(V).mT
    return U.reshape(-1, n).mT if v.ndim == 2 else U.reshape(n)
