r"""What an inverse covariance says about regression [KFAC, sec. 4.1]: ``Σ^{-1} = D^{-1} (I − B)``.

Row i of B holds the coefficients with which the other variables predict variable i best (in the least squares), and
``D_ii`` is the variance of what that prediction leaves. An inverse Fisher is nearly block-tridiagonal where the
derivatives of a layer's weights are predicted from those of the layers next to it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.spd import spd_inverse


def regression_view(
    covariance: Float[Tensor, "n n"], *, inverse: Float[Tensor, "n n"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """The diagonal of D and the matrix B with ``Σ^{-1} = D^{-1} (I − B)``.

    Args:
        covariance: Σ, symmetric positive definite: a damped Fisher matrix, for example.
        inverse: Σ^{-1}, where it is known.

    Returns:
        (D, B): D ``[n]`` is positive, B ``[n, n]`` has zeros on its diagonal.

    Raises:
        ValueError: Σ is singular; a damping is proposed.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance: expected a square matrix, got shape {list(covariance.shape)}")
    if inverse is None:
        try:
            inverse = spd_inverse(covariance, check=True).value
        except ValueError as error:
            scale = 1e-3 * (float(covariance.diagonal().abs().mean()) or 1.0)
            raise ValueError(
                f"the covariance {tuple(covariance.shape)} is singular, not positive definite or not finite; add a "
                f"multiple of the identity to it, for example {scale:.1e}"
            ) from error
    precision = inverse
    D = precision.diagonal().reciprocal()
    B = -D[:, None] * precision
    B.fill_diagonal_(0.0)
    return D, B


def block_means(matrix: Float[Tensor, "n n"], sizes: Sequence[int]) -> Float[Tensor, "blocks blocks"]:
    """The mean absolute entry of every block: the table of [KFAC, figs. 3, 5, 6].

    Args:
        matrix: in the order of the blocks (``to_dense(order="vec")`` has layer after layer).
        sizes: of the blocks; they add up to n.

    Raises:
        ValueError: they do not.
    """
    if sum(sizes) != matrix.shape[0] or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"sizes: {list(sizes)} add up to {sum(sizes)}; the matrix is {tuple(matrix.shape)}")
    rows = matrix.abs().split(list(sizes))
    return torch.stack([torch.stack([block.mean() for block in row.split(list(sizes), dim=1)]) for row in rows])
