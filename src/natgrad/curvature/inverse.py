r"""Inverses of one damped Kronecker block ``A ⊗ G``: immutable values that act on ``V [out, in (+1)]``.

``(A ⊗ G) vec(V) = vec(G V A)`` with columns stacked, so that the inverse of a Kronecker product is one product from
each side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, entries, kron, kron_blocks, to_dense
from natgrad.curvature.block_inverse import BlockInverse, FactoredInverse, LowRankInverse, inverse_of
from natgrad.curvature.gram import Gram
from natgrad.damping import ExactTikhonov, FactoredTikhonov, check_damping
from natgrad.linalg.iterative import NewtonSchulz
from natgrad.linalg.low_rank import DiagonalMinusLowRank, LowRank
from natgrad.linalg.reflectors import Reflectors
from natgrad.linalg.spd import safe_eigh, spd_inverse

# A matrix or None; in EigenAdam's bases Reflectors too, which the users of whole eigenbases need not know of.
Vectors = Any
FactorBasis = tuple[Vectors, Tensor, Bool[Tensor, ""]]


@dataclass(frozen=True)
class Eigenbasis:
    """``A = Q_A diag(a) Q_Aᵀ`` and ``G = Q_G diag(g) Q_Gᵀ``; None for the basis of a diagonal factor.

    Of a basis in the form of reflections the first columns alone are eigenvectors; a or g is the diagonal of the factor
    in it.
    """

    QA: Vectors
    QG: Vectors
    a: Float[Tensor, " columns"]
    g: Float[Tensor, " out"]
    ok: Bool[Tensor, ""]

    def rotate(
        self, V: Float[Tensor, "out columns"], out: Float[Tensor, "out columns"] | None = None
    ) -> Float[Tensor, "out columns"]:
        """``Q_Gᵀ V Q_A``: V in the eigenbasis; written to ``out``, another tensor, if it is given."""
        return _turned(self, V, out, back=False)

    def rotate_back(
        self, V: Float[Tensor, "out columns"], out: Float[Tensor, "out columns"] | None = None
    ) -> Float[Tensor, "out columns"]:
        """``Q_G V Q_Aᵀ``: the inverse of :meth:`rotate`."""
        return _turned(self, V, out, back=True)

    def to(self, dtype: torch.dtype) -> "Eigenbasis":
        """The same with eigenvectors in another dtype, in which products with them are then taken."""
        return replace(self, **{key: Q if Q is None else Q.to(dtype) for key, Q in (("QA", self.QA), ("QG", self.QG))})


class ExactInverse:
    r"""``(A ⊗ G + damping I)^{-1}`` [KFAC, sec. 6.3, eq. 6] in an eigenbasis that it shares with its successors.

    ``Q_G [ (Q_Gᵀ V Q_A) / (S + damping) ] Q_Aᵀ`` with ``S = g aᵀ``: four matrix products, two with one diagonal factor.

    Args:
        basis: of the undamped factors; rounding below zero is taken as zero.
        damping: the coefficient of the identity, a number or a 0-d tensor.
        scaling: another S: the second moments of :mod:`natgrad.curvature.ekfac`.
    """

    def __init__(
        self, basis: Eigenbasis, damping: float | Tensor, scaling: Float[Tensor, "out columns"] | None = None
    ) -> None:
        check_damping(damping)
        self.basis = basis
        self.scale = ((_outer(basis.g, basis.a) if scaling is None else scaling) + damping).reciprocal_()
        self.ok = basis.ok

    @property
    def shape(self) -> torch.Size:
        """That of the matrices V that it acts on."""
        return self.scale.shape

    def apply(self, V: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        """``(A ⊗ G + damping I)^{-1} vec(V)`` as a matrix."""
        rotated = self.basis.rotate(V.to(self.scale.dtype))
        # With a basis the rotated matrix is ours to overwrite.
        fresh = self.basis.QA is not None or self.basis.QG is not None
        rotated = rotated.mul_(self.scale) if fresh else rotated * self.scale
        return self.basis.rotate_back(rotated).to(V.dtype)

    def to_dense(self) -> Float[Tensor, "size size"]:
        """The matrix that acts on the stacked columns of V."""
        if self.scale.ndim == 3:
            return torch.block_diag(*(part.to_dense() for part in self._parts()))
        Q = kronecker_basis(self.basis)
        return (Q * self.scale.T.reshape(-1)) @ Q.T

    def _parts(self) -> "Iterator[ExactInverse]":
        """The inverses of a stack one by one."""
        basis = self.basis
        assert basis.QA is not None and basis.QG is not None  # no factor of a stack is kept as a diagonal
        for QA, QG, a, g, scale in zip(basis.QA, basis.QG, basis.a, basis.g, self.scale, strict=True):
            yield ExactInverse(Eigenbasis(QA, QG, a, g, basis.ok), 0.0, 1 / scale)


def kronecker_basis(basis: Eigenbasis) -> Float[Tensor, "size size"]:
    """``Q_A ⊗ Q_G`` as a matrix; of a stack the blocks after each other along the diagonal."""
    if basis.a.ndim > 1:
        assert basis.QA is not None and basis.QG is not None  # no factor of a stack is kept as a diagonal
        return kron_blocks(basis.QA, basis.QG)
    QA = torch.diag(torch.ones_like(basis.a)) if basis.QA is None else basis.QA
    QG = torch.diag(torch.ones_like(basis.g)) if basis.QG is None else basis.QG
    return kron(QA, QG)


def eigenbasis(
    factors: Factors, *, check: bool = False, what: str = "the block", same_A: Eigenbasis | None = None
) -> Eigenbasis:
    """The eigenbasis of a block; a diagonal factor is its own and costs nothing.

    Args:
        factors: A and G.
        check: raise instead of returning a basis whose ``ok`` is False.
        what: how an error names the block.
        same_A: the basis of a block with the same A, which is not decomposed again then.

    Raises:
        ValueError: with ``check``, when a factor is not finite.
    """
    if same_A is None:
        QA, a, ok_a = factor_basis(factors.A, check, f"A of {what}")
    else:
        QA, a, ok_a = same_A.QA, same_A.a, same_A.ok
    QG, g, ok_g = factor_basis(factors.G, check, f"G of {what}")
    return Eigenbasis(QA, QG, a, g, ok_a & ok_g)


def invert_block(
    factors: Factors,
    damping: float | Tensor,
    rule: FactoredTikhonov | ExactTikhonov = FactoredTikhonov(),  # noqa: B008 - frozen
    *,
    check: bool = False,
    what: str = "the block",
    previous: BlockInverse | None = None,
) -> BlockInverse:
    """The damped inverse of ``A ⊗ G``: a pure function.

    Args:
        factors: A and G.
        damping: λ + η or γ², the coefficient of the identity; a number or a 0-d tensor.
        rule: how the damping enters.
        check: raise where the inverse could not be used, instead of returning one whose ``ok`` is False.
        what: how an error names the block.
        previous: an earlier inverse of this block, from which a solver may start.

    Raises:
        ValueError: the damping is negative; with ``check``, the damped block is singular or not finite (a damping is
            proposed).
        TypeError: the rule is none of the two.
    """
    if isinstance(rule, ExactTikhonov):
        basis = eigenbasis(factors, check=check, what=what)
        if check:
            _check_regular(basis, damping, what)
        return ExactInverse(basis, damping)
    if not isinstance(rule, FactoredTikhonov):
        raise TypeError(f"rule: expected FactoredTikhonov(...) or ExactTikhonov(), got {rule!r}")
    A, G = entries(factors.A), entries(factors.G)
    if A.ndim == G.ndim == 1 and len(G) == 1:  # a diagonal matrix: to damp it exactly costs nothing
        scaled = A * G
        inverse, ok = _inverted(scaled, torch.as_tensor(damping, dtype=A.dtype, device=A.device))
        if check and not ok:
            _check_regular(eigenbasis(factors, check=True, what=what), damping, what)
        return FactoredInverse(inverse, torch.ones_like(G), ok)
    of_a, of_g = rule.split(A, G, damping)
    if check and float(damping) == 0:
        _check_regular(eigenbasis(factors, check=True, what=what), damping, what)
    if isinstance(rule.solver, LowRank):
        return _low_rank_inverse(A, G, of_a, of_g, rule.solver, previous, what if check else None)
    start = previous if isinstance(previous, FactoredInverse) else None
    A_inverse, ok_a = _inverted(A, of_a, rule.solver, None if start is None else start.A)
    G_inverse, ok_g = _inverted(G, of_g, rule.solver, None if start is None else start.G)
    if check and not (ok_a & ok_g):
        raise ValueError(
            f"{what}: no inverse with damping={float(damping):g}; a factor is not finite, or give a larger damping"
        )
    return FactoredInverse(A_inverse, G_inverse, ok_a & ok_g)


def factor_basis(factor: Tensor | Diagonal | Gram, check: bool = False, what: str = "the factor") -> FactorBasis:
    """The eigenvectors of one factor, its eigenvalues, and whether both can be used.

    Args:
        factor: A or G; a diagonal one is its own and costs nothing.
        check: raise instead.
        what: how an error names the factor.

    Raises:
        ValueError: with ``check``, when the factor is not finite.
    """
    if isinstance(factor, Diagonal):
        if check and not torch.isfinite(factor.vector).all():
            raise ValueError(f"{what} holds NaN or infinite values")
        return None, factor.vector.clamp(min=0), torch.isfinite(factor.vector).all()
    values, vectors, ok = safe_eigh(to_dense(factor), check=check, what=what)
    # By rows, whatever the backend returns: products round alike when a checkpoint brings the same numbers back.
    return vectors.contiguous(), values.clamp(min=0), ok


def _inverted(
    M: Tensor, damping: Tensor, solver: NewtonSchulz | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if M.ndim == 1:
        damped = M + damping
        return damped.reciprocal(), (damped > 0).all() & torch.isfinite(damped).all()
    if solver is None or M.ndim > 2:
        return spd_inverse(M, damping)
    return solver.inverse(M, damping, start)


def _low_rank_inverse(
    A: Tensor,
    G: Tensor,
    of_a: Tensor,
    of_g: Tensor,
    solver: LowRank,
    previous: BlockInverse | None,
    what: str | None,
) -> LowRankInverse | FactoredInverse:
    found, ok = [], torch.ones((), dtype=torch.bool, device=of_a.device)
    for key, M, damping in (("A", A, of_a), ("G", G, of_g)):
        if M.ndim != 2 or not solver.applies(len(M)):
            inverse, usable = _inverted(M, damping)
        else:
            start = getattr(previous, key, None)
            start = start if isinstance(start, DiagonalMinusLowRank) else None
            inverse, usable = solver.inverse(M, damping, start)
        found.append(inverse)
        ok = ok & usable
    if what is not None and not ok:
        raise ValueError(f"{what}: no inverse of low rank plus diagonal; a factor is not finite, or give a damping")
    return inverse_of(found[0], found[1], ok)


def _check_regular(basis: Eigenbasis, damping: float | Tensor, what: str) -> None:
    """Refuse an undamped inverse of a singular block."""
    largest = float(basis.a.max() * basis.g.max())
    smallest = float(basis.a.min() * basis.g.min())
    precision = torch.finfo(basis.a.dtype).eps * max(len(basis.a), len(basis.g))
    singular = any(bool(values.min() <= values.max() * precision) for values in (basis.a, basis.g))
    if float(damping) == 0 and (singular or smallest <= 0):
        mean = float(basis.a.mean() * basis.g.mean())
        proposal = 1e-3 * (mean or largest or 1.0)
        raise ValueError(
            f"{what} is singular (eigenvalues from {smallest:.1e} to {largest:.1e}) and has no undamped inverse; "
            f"pass a damping, for example damping={proposal:.1e}"
        )


def _turned(basis: Eigenbasis, V: Tensor, out: Tensor | None, *, back: bool) -> Tensor:
    """``Q_Gᵀ V Q_A`` or ``Q_G V Q_Aᵀ``, where None stands for the identity; products in the dtype of the Q."""
    QG, QA = basis.QG, basis.QA
    Q = QG if QG is not None else QA
    if Q is not None and Q.dtype != V.dtype:
        product = _turned(basis, V.to(Q.dtype), None, back=back)
        return product.to(V.dtype) if out is None else out.copy_(product)
    if isinstance(QG, Reflectors):
        into = out if QA is None or isinstance(QA, Reflectors) else None  # reflections work in place, products do not
        V = QG.left(V, into) if back else QG.left_transposed(V, into)
    elif QG is not None:
        V = torch.matmul(QG if back else QG.mT, V, out=out if QA is None else None)
    if isinstance(QA, Reflectors):
        return QA.right_transposed(V, out) if back else QA.right(V, out)
    if QA is not None:
        return torch.matmul(V, QA.mT if back else QA, out=out)
    return V if out is None or V is out else out.copy_(V)


def _outer(g: Tensor, a: Tensor) -> Tensor:
    """``g aᵀ``, for a stack of each."""
    return g[..., :, None] * a[..., None, :]
