"""The preconditioned gradient from the rows of a small batch [KFAC, sec. 8].

``U = G^{-1} (1/m 𝒢 𝒜ᵀ) A^{-1} = 1/m (G^{-1} 𝒢) (𝒜ᵀ A^{-1})``: products with m rows instead of two with whole matrices.
The l2 term of the gradient has full rank and is preconditioned apart.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.block_inverse import FactoredInverse, times_right
from natgrad.layers.factors import with_ones


def low_rank_pays(rows: int, out: int, columns: int, *, dense_out: bool = True, dense_in: bool = True) -> bool:
    """Whether the low-rank form takes fewer operations: ``m (d_o² + d_i² + d_o d_i) < d_o d_i (d_o + d_i)``.

    The paper's count leaves out ``m d_o d_i``, for the gradient's product that this one replaces; here the gradient is
    needed all the same, for ∇h·δ.

    Args:
        rows: m.
        out: d_o.
        columns: d_i.
        dense_out: False where the inverse of G is diagonal: its products cost next to nothing.
        dense_in: the same for A.
    """
    low = rows * (dense_out * out**2 + dense_in * columns**2 + out * columns)
    return low < out * columns * (dense_out * out + dense_in * columns)


def low_rank_apply(
    inverse: FactoredInverse, rows: Sequence[tuple[Float[Tensor, "m in"], Float[Tensor, "m out"]]], count: Tensor
) -> Float[Tensor, "out columns"]:
    """The inverse times the mean gradient ``1/count Σ g āᵀ``.

    Args:
        inverse: of the damped block.
        rows: (a, g) chunks; g is the derivative of the summed nll.
        count: what the sum is divided by.
    """
    columns = inverse.A.shape[0]
    total: Tensor | None = None
    for a, g in rows:
        left = times_right(inverse.G, g)
        right = times_right(inverse.A, with_ones(a, bias=columns > a.shape[-1]))
        total = left.T @ right if total is None else total.addmm_(left.T, right)
    if total is None:
        raise ValueError("rows: expected at least one chunk")
    return total / count
