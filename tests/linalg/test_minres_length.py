"""MINRES-QLP's solutions of incompatible systems are short, wherever it stops; also with preconditioner and start."""

import math

import pytest
import torch
from linalg.systems import generator
from torch import Tensor

from natgrad.linalg import minres_qlp


def system(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A singular A of any scale, condition and sign, its eigenvectors and eigenvalues that are not 0; b."""
    g = generator(seed)

    def uniform() -> float:
        return float(torch.rand((), generator=g))

    n = 3 + int(50 * uniform())
    rank = max(1, int(n * uniform()))
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    values = torch.logspace(0, -6 * uniform(), rank, dtype=torch.float64) * 10 ** (12 * uniform() - 6)
    if uniform() < 0.5:
        values = values * torch.randn(rank, generator=g, dtype=torch.float64).sign()
    if uniform() < 0.2:
        values = values[torch.randint(rank, (rank,), generator=g)]
    P = Q[:, :rank]
    A = (P * values) @ P.T
    return (A + A.T) / 2, P, values, torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("tol", [1e-4, 1e-7, 1e-10, 1e-12, 0.0])
def test_never_longer_than_the_shortest_least_squares_solution(tol: float) -> None:
    for seed in range(150):
        A, P, values, b = system(seed)
        shortest = P @ ((P.T @ b) / values)
        found = minres_qlp(A, b, tol=tol, max_iters=10 * len(b) + 50)
        assert found.reason in ("least_squares", "ill_conditioned"), seed
        # With few digits the residual has other parts than b's in the null space, and may not grow for a shorter x.
        slack = 1.5 if tol > 1e-7 else 0.001
        assert found.x.norm() <= (1 + slack) * shortest.norm(), (seed, float(found.x.norm() / shortest.norm()))
        true = b - A @ found.x
        torch.testing.assert_close(found.residual, true, rtol=1e-8, atol=1e-9 * float(b.norm()))
        torch.testing.assert_close(found.residual_norm, true.norm(), rtol=1e-8, atol=0)
        if tol <= 1e-7:  # what tol bounds is ‖A r‖
            assert true.norm() <= 1.01 * (b - A @ shortest).norm(), seed


def test_with_a_preconditioner_the_length_is_in_its_norm() -> None:
    for seed in range(40):
        A, _, _, b = system(seed)
        n = len(b)
        X = torch.randn(n, n + 2, generator=generator(seed), dtype=torch.float64)
        inverse = X @ X.T / n + 0.3 * torch.eye(n, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(inverse)
        root = (vectors * values.sqrt()) @ vectors.T
        shortest = root @ torch.linalg.pinv(root @ A @ root, rtol=1e-9, hermitian=True) @ root @ b
        found = minres_qlp(A, b, tol=1e-6, max_iters=500, preconditioner=inverse)
        length, least = (float(torch.dot(x, torch.linalg.solve(inverse, x))) for x in (found.x, shortest))
        assert math.sqrt(length) <= 1.001 * math.sqrt(least), seed


def test_from_a_start_the_correction_is_short() -> None:
    for seed in range(40):
        A, P, values, b = system(seed)
        start = torch.randn(len(b), generator=generator(seed + 1), dtype=torch.float64)
        shortest = P @ ((P.T @ (b - A @ start)) / values)
        found = minres_qlp(A, b, tol=1e-7, max_iters=10 * len(b) + 50, x0=start)
        assert (found.x - start).norm() <= 1.001 * shortest.norm() + 1e-12, seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_that_is_rounding_is_not_taken_from_the_solution(dtype: torch.dtype) -> None:
    """Compatible, and so ill-conditioned that the solver gives up: the solution still is as good as it was."""
    for seed in range(60):
        A, P, values, b = system(seed)
        A, b = A.to(dtype), (P @ (values * (P.T @ b))).to(dtype)
        found = minres_qlp(A, b, tol=0.0, max_iters=10 * len(b) + 50)
        true = (b - A @ found.x).norm()
        assert torch.isfinite(found.x).all()
        assert true <= 2e-3 * b.norm() if dtype == torch.float32 else true <= 1e-9 * b.norm(), (seed, found.reason)
