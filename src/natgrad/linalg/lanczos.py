"""The extreme eigenvalues of a symmetric operator by Lanczos' method."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Ritz(NamedTuple):
    """Ritz values in ascending order, and the vectors in the space of the operator as columns."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]


def lanczos(matvec: Callable[[Tensor], Tensor], start: Float[Tensor, " n"], steps: int) -> Ritz:
    r"""Eigenvalues and eigenvectors of A on the Krylov space ``span(b, A b, …, A^{k−1} b)``.

    The largest and smallest values converge to those of A, fast where they stand apart. Every new vector is made
    orthogonal to all earlier ones, twice: that costs little for the few steps that extreme eigenvalues take.

    Args:
        matvec: ``v ↦ A v`` with A symmetric.
        start: b, not zero.
        steps: k at most; fewer where the space is exhausted.

    Raises:
        ValueError: fewer than one step, or a start that is zero or not finite.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least one")
    norm = start.norm()
    if not torch.isfinite(norm) or norm == 0:
        raise ValueError("start: expected a finite vector that is not zero")
    basis, products = [start / norm], []
    tolerance = torch.finfo(start.dtype).eps * start.numel() ** 0.5
    scale = norm.new_zeros(())
    for _ in range(min(steps, start.numel())):
        product = matvec(basis[-1])
        products.append(product)
        scale = torch.maximum(scale, product.norm())
        Q = torch.stack(basis, dim=1)
        rest = product - Q @ (Q.T @ product)
        rest = rest - Q @ (Q.T @ rest)
        beta = rest.norm()
        if not beta > tolerance * scale:  # also where it is not finite
            break
        basis.append(rest / beta)
    Q, AQ = torch.stack(basis[: len(products)], dim=1), torch.stack(products, dim=1)
    T = Q.T @ AQ
    values, vectors = torch.linalg.eigh((T + T.T) / 2)
    return Ritz(values, Q @ vectors)
