r"""The block-tridiagonal inverse of a chain some of whose factors are low rank plus a diagonal [KFAC, sec. 4.3, 8].

A wide factor ``M = A + π γ I`` (or its G) stands for ``M' = U S Uᵀ + D`` with its leading eigenvectors U and what they
leave on the diagonal, the cross factors of its layer for their projections on U. F̃ of these factors has a
block-tridiagonal counterpart like any other, and it is positive definite: M' is never below its own projection. In
coordinates W of the subspace the whole of a layer's relation to its neighbours is a small matrix, its *core*: with G
and A wide ``K = W_Gᵀ V W_A``, which the products of the layer's own inverse make nearly for nothing,

.. math:: G'^{-1} V A'^{-1} = (D_G^{-1} - W_G W_G^T) \, V \, (D_A^{-1} - W_A W_A^T),

and what :class:`~natgrad.curvature.edges.Edge` adds to it, ``W_G E W_Aᵀ``, goes into the last product of the two sides.
A factor that is not wide is its own core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from natgrad.curvature.base import Factors, to_dense
from natgrad.curvature.block_inverse import FactoredInverse, LowRankInverse, inverse_of
from natgrad.curvature.edges import Canonical, Edge, canonical
from natgrad.curvature.pairs import pair_key
from natgrad.damping import FactoredTikhonov
from natgrad.linalg.low_rank import DiagonalMinusLowRank, LowRank
from natgrad.linalg.spd import spd_inverse

ChainBlock = FactoredInverse | LowRankInverse


@dataclass(frozen=True)
class CoupledInverse:
    """``F̂^{-1}`` of damped factors; never changes.

    Args:
        blocks: of F̆, by layer name.
        edges: by the key of the pair, on the cores of the layers.
        ok: whether it can be used.
    """

    blocks: dict[str, ChainBlock]
    edges: dict[str, Edge]
    ok: Bool[Tensor, ""]


@dataclass(frozen=True)
class _Side:
    """One damped factor of a layer.

    Attributes:
        inverse: of the factor.
        damped: the factor in the coordinates of its core: itself, or 1.0 where the core is white.
        within: ``U Uᵀ B`` for white coordinates B of the core; None where the factor is its own core.
        scale: ``B = W diag(scale)``.
        ok: whether it can be used.
    """

    inverse: Tensor | DiagonalMinusLowRank
    damped: Tensor | float
    within: Tensor | None
    scale: Tensor | None
    ok: Bool[Tensor, ""]

    @classmethod
    def of(cls, M: Tensor, damping: Tensor, solver: LowRank | None, previous: object) -> "_Side":
        if solver is not None and solver.applies(len(M)):
            start = previous if isinstance(previous, DiagonalMinusLowRank) else None
            found = solver.leading(M, damping, start)
            return cls(found.inverse, 1.0, found.within, found.t.rsqrt(), found.ok)
        inverse, ok = spd_inverse(M, damping)
        damped = M.clone()
        damped.diagonal().add_(damping)
        return cls(inverse, damped, None, None, ok)

    @property
    def whole(self) -> Tensor | None:
        """The inverse in the coordinates of the core; None for the unit matrix."""
        return self.inverse if isinstance(self.inverse, Tensor) else None


def invert_chain(
    order: Sequence[str],
    factors: Mapping[str, Factors],
    damping: float | Tensor,
    rule: FactoredTikhonov,
    previous: Mapping[str, object] | None = None,
) -> CoupledInverse:
    """F̂^{-1} of the damped factors of a chain: a pure function.

    Args:
        order: the layers, in forward order.
        factors: of the layers, and of neighbours by :func:`~natgrad.curvature.pairs.pair_key`.
        damping: γ².
        rule: how it enters; its solver, if any, is a :class:`~natgrad.linalg.LowRank`.
        previous: earlier inverses of the layers, from whose subspaces the search for new ones starts.
    """
    solver = rule.solver if isinstance(rule.solver, LowRank) else None
    sides: dict[str, tuple[_Side, _Side]] = {}
    for name in order:
        A, G = to_dense(factors[name].A), to_dense(factors[name].G)
        of_a, of_g = rule.split(A, G, damping)
        before = (previous or {}).get(name)
        sides[name] = (
            _Side.of(A, of_a, solver, getattr(before, "A", None)),
            _Side.of(G, of_g, solver, getattr(before, "G", None)),
        )
    blocks = {name: inverse_of(A.inverse, G.inverse, A.ok & G.ok) for name, (A, G) in sides.items()}
    ok = torch.stack([block.ok for block in blocks.values()]).all()
    edges: dict[str, Edge] = {}
    if ok:
        for lower, upper in zip(order[:-1], order[1:], strict=True):
            cross = factors[pair_key(lower, upper)]
            A, ok_a = _coordinates(sides[lower][0], to_dense(cross.A), sides[upper][0])
            G, ok_g = _coordinates(sides[lower][1], to_dense(cross.G), sides[upper][1])
            edges[pair_key(lower, upper)] = Edge(A, G)
            ok = ok & ok_a & ok_g
    return CoupledInverse(blocks, edges, ok)


def carriers(order: Sequence[str], blocks: Mapping[str, object], edges: Mapping[str, Edge]) -> dict[str, str]:
    """By layer, the key of the first edge that can apply the layer's own inverse along (:attr:`Edge.whole`).

    Args:
        order: the layers, in forward order.
        blocks: their inverses; one with a factor of low rank is not all in its core, and stands for itself.
        edges: by the key of the pair.
    """
    found: dict[str, str] = {}
    for pair in zip(order[:-1], order[1:], strict=True):
        edge = edges.get(pair_key(*pair))
        if edge is not None and edge.whole is not None:
            name = pair[edge.whole]
            if name not in found and isinstance(blocks.get(name), FactoredInverse):
                found[name] = pair_key(*pair)
    return found


def _coordinates(lower: _Side, cross: Tensor, upper: _Side) -> tuple[Canonical, Bool[Tensor, ""]]:
    """Canonical coordinates of one factor of a pair, on the cores."""
    if upper.within is not None:
        cross = cross @ upper.within
    if lower.within is not None:
        cross = lower.within.mT @ cross
    found, ok = canonical(lower.damped, cross, upper.damped, lower.whole, upper.whole)
    X = found.X if lower.scale is None else lower.scale[:, None] * found.X
    Y = found.Y if upper.scale is None else upper.scale[:, None] * found.Y
    return Canonical(X, Y, found.squares), ok


class Started:
    """A layer's product with its own inverse, as far as the neighbours have to be waited for.

    Args:
        block: the inverse.
        V: the gradient, ``[out, columns]``.
        into: the buffer for the proposal, shaped like it.

    Attributes:
        core: what the neighbours see of V.
        added: a buffer shaped like it, for what they contribute.
    """

    def __init__(self, block: LowRankInverse, V: Tensor, into: Tensor) -> None:
        self._A, self._G, self._into = block.A, block.G, into
        like = self._G.d if isinstance(self._G, DiagonalMinusLowRank) else self._G
        V = V.to(like.dtype)
        direct = isinstance(self._A, DiagonalMinusLowRank) and into.dtype == V.dtype
        half = into if direct else torch.empty_like(V)
        if isinstance(self._G, DiagonalMinusLowRank):
            core = self._G.W.mT @ V
            torch.mul(self._G.d[:, None], V, out=half).addmm_(self._G.W, core, alpha=-1)
        else:
            core = V
            torch.mm(self._G, V, out=half)
        self._half = half
        self.core = core @ self._A.W if isinstance(self._A, DiagonalMinusLowRank) else core
        self.added = torch.zeros_like(self.core)

    def finish(self) -> None:
        """Write minus the product with the own inverse, and what the neighbours added."""
        A, half = self._A, self._half
        added = self._G.W @ self.added if isinstance(self._G, DiagonalMinusLowRank) else self.added
        if isinstance(A, DiagonalMinusLowRank):
            inner = added.addmm_(half, A.W)
            half.mul_(-A.d).addmm_(inner, A.W.mT)
        else:
            half = added.addmm_(half, A, alpha=-1)
        if half is not self._into:
            self._into.copy_(half)
