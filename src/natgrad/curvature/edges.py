r"""``F̂^{-1}`` for the hot path: the block-diagonal inverse, and one correction per pair of neighbouring layers.

For a Gaussian chain the precision is a sum over its edges, ``F̂^{-1} = Σ (F̃ of i and i+1)^{-1} − Σ F̃_ii^{-1}`` (the
second sum over inner layers), the same whichever way the edges point. That is ``Ξᵀ Λ Ξ`` of [KFAC, sec. 4.3] (a test);
written so, a layer's own inverse is that of F̆ and the rest is small: in the canonical coordinates of a pair, where
layer i has P, layer i+1 has Q and their covariance is the diagonal s,

.. math:: U_i \mathrel{+}= \frac{s^2 P - s Q}{1 - s^2}, \qquad U_{i+1} \mathrel{+}= \frac{s^2 Q - s P}{1 - s^2}.

Both factors of a pair have canonical coordinates of their own, ``s = s_G s_Aᵀ``, as many as the smaller of the two
layers has. They come from the eigenvectors of [KFAC, app. B], of the smaller side alone; the larger side needs no more
than the inverse that F̆ needs anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from natgrad.linalg.stein import pair_eigh


@dataclass(frozen=True)
class Canonical:
    r"""Canonical coordinates of one factor of a pair, A or G.

    On the side with fewer dimensions they are whitened, on the other one scaled by s once more: ``Xᵀ A_i X = I`` and
    ``Yᵀ A_{i+1} Y = diag(s²)``, or the other way round; ``Xᵀ A_{i,i+1} Y = diag(s²)``. No division by s anywhere.

    Args:
        X: of the lower layer.
        Y: of the upper one.
        squares: s².
    """

    X: Float[Tensor, "lower r"]
    Y: Float[Tensor, "upper r"]
    squares: Float[Tensor, " r"]

    @property
    def whitens_lower(self) -> bool:
        """Whether the lower layer is the side with fewer dimensions."""
        return self.X.shape[0] < self.Y.shape[0]


class Edge:
    """The correction for one pair of neighbouring layers.

    Args:
        A: coordinates of the layers' inputs.
        G: of the derivatives at their outputs.

    Attributes:
        clipped: how many eigenvalues ``1 − s²`` were raised to working precision.
    """

    def __init__(self, A: Canonical, G: Canonical) -> None:
        self.A, self.G = A, G
        squares = torch.outer(G.squares, A.squares)
        rest = 1 - squares
        floor = 10 * torch.finfo(rest.dtype).eps * max(len(A.Y), len(A.X), len(G.X), len(G.Y))
        self.clipped: Int[Tensor, ""] = (rest < floor).sum()
        self.weight = rest.clamp_(min=floor).reciprocal_()
        ones = [torch.ones_like(c.squares) for c in (G, A)]
        of_lower = [c.squares if c.whitens_lower else one for c, one in zip((G, A), ones, strict=True)]
        of_upper = [one if c.whitens_lower else c.squares for c, one in zip((G, A), ones, strict=True)]
        self._lower = torch.outer(*of_lower).mul_(self.weight)
        self._upper = torch.outer(*of_upper).mul_(self.weight)

    @property
    def whole(self) -> int | None:
        """0 for the lower layer, 1 for the upper one: the one that has fewer dimensions in both factors; else None.

        Its coordinates span everything, ``Y Yᵀ = A_{i+1}^{-1}``: its own inverse is the unit matrix in them. (Where
        the layer has a core, see :mod:`natgrad.curvature.cores`, that is said of the core alone.)
        """
        if self.A.whitens_lower != self.G.whitens_lower:
            return None
        return 0 if self.A.whitens_lower else 1

    def subtract(self, V: Sequence[Tensor], into: Sequence[Tensor], *, whole: bool = False) -> None:
        """Subtract both corrections from two buffers.

        Args:
            V: the matrices of the lower and of the upper layer, ``[out, columns]``.
            into: buffers shaped like them.
            whole: subtract the own inverse of the layer :attr:`whole` along, at no cost: with s²/(1 − s²) for its
                correction the two are 1/(1 − s²).
        """
        of_lower = self.weight if whole and self.whole == 0 else self._lower
        of_upper = self.weight if whole and self.whole == 1 else self._upper
        P = _coordinates(self.G.X, V[0].to(self.weight.dtype), self.A.X)
        Q = _coordinates(self.G.Y, V[1].to(self.weight.dtype), self.A.Y)
        _subtract_product(self.G.X, (of_lower * P).addcmul_(self.weight, Q, value=-1), self.A.X, into[0])
        _subtract_product(self.G.Y, (of_upper * Q).addcmul_(self.weight, P, value=-1), self.A.Y, into[1])


def canonical(
    lower: Tensor | float,
    cross: Tensor,
    upper: Tensor | float,
    lower_inverse: Tensor | None,
    upper_inverse: Tensor | None,
) -> tuple[Canonical, Bool[Tensor, ""]]:
    """Canonical coordinates of one factor, and whether they can be used.

    Args:
        lower: the damped A or G of the lower layer; 1.0 where its coordinates are white already.
        cross: that of the pair.
        upper: the damped one of the upper layer; likewise.
        lower_inverse: of ``lower``; None for the unit matrix.
        upper_inverse: of ``upper``; likewise.
    """
    if cross.shape[0] < cross.shape[1]:
        turned, ok = canonical(upper, cross.mT, lower, upper_inverse, lower_inverse)
        return Canonical(turned.Y, turned.X, turned.squares), ok
    regression = cross if lower_inverse is None else lower_inverse @ cross
    Y, squares, ok = pair_eigh(upper, cross.mT @ regression)
    Y = Y.contiguous()
    return Canonical(regression @ Y, Y, squares.clamp(min=0)), ok


def _coordinates(left: Tensor, V: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ V right``, the cheaper product first."""
    r, d = left.shape[1], left.shape[0]
    if r * V.shape[1] * (d + right.shape[1]) <= V.shape[1] * right.shape[1] * d + d * right.shape[1] * r:
        return (left.mT @ V) @ right
    return left.mT @ (V @ right)


def _subtract_product(left: Tensor, E: Tensor, right: Tensor, into: Tensor) -> None:
    """``into −= left E rightᵀ``, the cheaper product first."""
    (d, r), (e, k) = left.shape, right.shape
    first = d * r * k + d * k * e <= r * k * e + d * r * e
    factors = (left @ E, right.mT) if first else (left, E @ right.mT)
    if into.dtype == E.dtype:
        into.addmm_(*factors, alpha=-1)
    else:
        into.sub_((factors[0] @ factors[1]).to(into.dtype))
