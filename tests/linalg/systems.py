"""Generated symmetric systems of a known spectrum."""

import math

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(
    n: int, rank: int, condition: float = 10.0, *, indefinite: bool = False, seed: int = 0, dtype=torch.float64
) -> Tensor:
    """Eigenvalues from 1 down to 1/condition, of either sign where it is indefinite; the others are 0."""
    g = generator(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    if indefinite:
        values = values * (1 - 2 * (torch.rand(rank, generator=g) < 0.5).double())
    matrix = (basis[:, :rank] * values) @ basis[:, :rank].T
    return ((matrix + matrix.T) / 2).to(dtype)


def minimum_norm(A: Tensor, b: Tensor, rcond: float = 1e-10) -> Tensor:
    """The least-squares solution of minimum length, by the singular value decomposition."""
    return torch.linalg.lstsq(A, b, driver="gelsd", rcond=rcond).solution


def vector(n: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(n, generator=generator(seed + 1000), dtype=dtype)
