"""From layer inputs a and output derivatives g to sums of outer products: pure functions.

Rows are uses of a layer: one per example for a plain batch, one per example and position for a sequence, one more for
every further call. Sums, never means: the division is made once, in :mod:`natgrad.curvature.base`.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def flatten_rows(x: Float[Tensor, "... d"]) -> Float[Tensor, "rows d"]:
    """All leading dimensions as one; a vector is one row."""
    return x.reshape(-1, x.shape[-1])


def with_ones(a: Float[Tensor, "... d"], bias: bool) -> Float[Tensor, "rows columns"]:
    """``[a 1]``: the homogeneous coordinate is the last column; without a bias just the rows of a."""
    a = flatten_rows(a)
    return torch.cat([a, a.new_ones(a.shape[0], 1)], dim=1) if bias else a


def second_moment(x: Float[Tensor, "rows d"], out: Float[Tensor, "d d"] | None = None) -> Float[Tensor, "d d"]:
    """``Σ x xᵀ`` over the rows, added to ``out`` in place where that is given."""
    if out is None:
        return torch.mm(x.T, x)
    return out.addmm_(x.T, x)


def input_moment(a: Float[Tensor, "... d"], weight: bool = True, bias: bool = True) -> Float[Tensor, "columns columns"]:
    r"""``Σ ā āᵀ`` over the rows, with ``ā = [a 1]`` where the layer has a bias: the raw sum behind the factor A.

    Assembled from ``Σ a aᵀ``, the column sums and the number of rows: the column of ones is never materialised.

    Args:
        a: layer inputs, any number of leading dimensions.
        weight: whether a itself belongs to the block (False for a frozen weight).
        bias: whether the homogeneous 1 belongs to it, as the last coordinate.
    """
    a = flatten_rows(a)
    rows, d = a.shape
    if not bias:
        return second_moment(a)
    if not weight:
        return a.new_full((1, 1), rows)
    moment = a.new_empty(d + 1, d + 1)
    torch.mm(a.T, a, out=moment[:d, :d])
    return _bordered(moment, a.sum(0), rows)


def cross_moment(
    a: Float[Tensor, "... d"],
    b: Float[Tensor, "... e"],
    of_a: tuple[bool, bool] = (True, True),
    of_b: tuple[bool, bool] = (True, True),
) -> Float[Tensor, "rows_of_a columns"]:
    r"""``Σ ā b̄ᵀ`` over the rows of two layers' inputs, each with the homogeneous 1 where its layer has a bias.

    As for :func:`input_moment` the columns of ones are never materialised.

    Args:
        a: inputs of one layer.
        b: those of another on the same rows.
        of_a: whether weight and bias of the first layer belong to its block.
        of_b: likewise for the second.
    """
    a, b = flatten_rows(a), flatten_rows(b)
    rows, d = a.shape
    e = b.shape[1]
    moment = a.new_empty(d * of_a[0] + of_a[1], e * of_b[0] + of_b[1])
    if of_a[0] and of_b[0]:
        torch.mm(a.T, b, out=moment[:d, :e])
    if of_a[0] and of_b[1]:
        moment[:d, -1] = a.sum(0)
    if of_a[1] and of_b[0]:
        moment[-1, :e] = b.sum(0)
    if of_a[1] and of_b[1]:
        moment[-1, -1] = rows
    return moment


def joint_moment(
    moment: Float[Tensor, "*stack d d"],
    sums: Float[Tensor, "*stack d"],
    rows: float | Tensor,
    weight: bool = True,
    bias: bool = True,
) -> Float[Tensor, "*stack columns columns"]:
    r"""``Σ ā āᵀ`` from ``Σ a aᵀ``, ``Σ a`` and the number of rows, for one block or a stack of them.

    Args:
        moment: ``Σ a aᵀ``.
        sums: ``Σ a``.
        rows: their number; broadcast over the stack.
        weight: as for :func:`input_moment`.
        bias: as for :func:`input_moment`.
    """
    d = moment.shape[-1]
    if not bias:
        return moment
    if not weight:
        return moment.new_ones(*moment.shape[:-2], 1, 1) * rows
    joint = moment.new_empty(*moment.shape[:-2], d + 1, d + 1)
    joint[..., :d, :d] = moment
    return _bordered(joint, sums, rows)


def _bordered(joint: Tensor, sums: Tensor, rows: float | Tensor) -> Tensor:
    """In place: the last row and column of a joint moment."""
    joint[..., :-1, -1] = sums
    joint[..., -1, :-1] = sums
    joint[..., -1, -1] = rows
    return joint
