"""MINRES-QLP against dense minimum-norm solutions and SciPy on singular, indefinite and ill-conditioned systems."""

import math

import pytest
import torch
from linalg.systems import generator, minimum_norm, symmetric, vector
from scipy.sparse.linalg import minres as scipy_minres

from natgrad.linalg import RelativeProgress, cg, minres_qlp


def system(seed):
    """Sizes, ranks, conditions, signs and right-hand sides in turn: A, b, condition, compatible."""
    g = generator(seed + 999)
    n = int(torch.randint(1, 30, (), generator=g))
    rank = n if seed % 3 == 0 else int(torch.randint(1, n + 1, (), generator=g))
    condition = 10 ** float(4 * torch.rand((), generator=g))
    A, b = symmetric(n, rank, condition, indefinite=bool(seed % 2), seed=seed), vector(n, seed)
    compatible = seed % 4 < 2 or rank == n
    return A, A @ b if compatible else b, condition if rank > 1 else 1.0, compatible


@pytest.mark.parametrize("seed", range(300))
def test_equals_the_minimum_norm_solution(seed):
    A, b, condition, compatible = system(seed)
    expected = minimum_norm(A, b)
    solution = minres_qlp(A, b, tol=1e-10, max_iters=20 * len(b) + 20)
    assert solution.reason == "converged" if compatible else solution.reason in ("least_squares", "ill_conditioned")
    assert (solution.x - expected).norm() <= 2e-6 * condition * expected.norm()
    assert solution.x.norm() <= (1 + 1e-6 * condition) * expected.norm()
    residual = b - A @ solution.x
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-9 * condition)
    torch.testing.assert_close(solution.residual_norm, residual.norm(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(solution.residual_norm, (b - A @ expected).norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_every_iterate_is_that_of_scipy(seed):
    """On a system that is not singular, MINRES and MINRES-QLP have the same iterates."""
    n, iterations = 3 + seed % 12, 1 + seed % 5
    A, b = symmetric(n, n, 30.0, indefinite=bool(seed % 2), seed=seed), vector(n, seed)
    preconditioner = symmetric(n, n, 5.0, seed=seed + 7) if seed % 3 == 0 else None
    reference, _ = scipy_minres(
        A.numpy(), b.numpy(), rtol=0, maxiter=min(iterations, n - 1),
        M=None if preconditioner is None else preconditioner.numpy(),
    )  # fmt: skip
    solution = minres_qlp(A, b, tol=0, max_iters=min(iterations, n - 1), preconditioner=preconditioner)
    torch.testing.assert_close(solution.x, torch.from_numpy(reference), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(solution.residual_norm, (b - A @ solution.x).norm(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_ill_conditioned_compatible_systems_converge(seed):
    A = symmetric(12, 12, 1e8, indefinite=bool(seed % 2), seed=seed)
    b = A @ vector(12, seed)
    solution = minres_qlp(A, b, tol=1e-9, max_iters=500)
    assert (b - A @ solution.x).norm() <= 2e-8 * b.norm()


@pytest.mark.parametrize("seed", range(20))
def test_preconditioned_minimum_norm_of_singular_systems(seed):
    """The length is that of the preconditioner's norm: x = M^{-1/2} (M^{-1/2} A M^{-1/2})⁺ M^{-1/2} b."""
    n = 14
    A, b, inverse = symmetric(n, 9, 50.0, indefinite=bool(seed % 2), seed=seed), vector(n, seed), symmetric(n, n, 8.0)
    values, vectors = torch.linalg.eigh(inverse)
    root = (vectors * values.sqrt()) @ vectors.T
    for rhs, tolerance in ((A @ b, 1e-7), (b, 1e-4)):
        expected = root @ minimum_norm(root @ A @ root, root @ rhs)
        solution = minres_qlp(A, rhs, tol=1e-10, max_iters=200, preconditioner=inverse)
        torch.testing.assert_close(solution.x, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(solution.residual_norm, (rhs - A @ solution.x).norm(), rtol=1e-5, atol=1e-8)


def test_a_right_hand_side_in_the_null_space():
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solution = minres_qlp(A, torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64))
    assert solution.reason == "least_squares"
    assert torch.equal(solution.x, torch.zeros(3, dtype=torch.float64))
    assert float(solution.residual_norm) == 3


def test_an_eigenvector_needs_one_iteration():
    A = torch.diag(torch.tensor([2.0, -4.0], dtype=torch.float64))
    solution = minres_qlp(A, torch.tensor([0.0, 1.0], dtype=torch.float64), tol=1e-12)
    assert (solution.reason, solution.iterations) == ("converged", 1)
    torch.testing.assert_close(solution.x, torch.tensor([0.0, -0.25], dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "attainable"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_incompatible_system_in_both_precisions(dtype, attainable):
    """Rounding lets a least-squares solution be found to about the root of the dtype's resolution."""
    A, b = symmetric(20, 12, 10.0, indefinite=True, dtype=dtype), vector(20, dtype=dtype)
    solution = minres_qlp(A, b, tol=1e-12, max_iters=100)
    assert solution.reason == "least_squares"
    assert solution.x.dtype == dtype
    expected = minimum_norm(A.double(), b.double(), rcond=1e-5)
    assert (solution.x.double() - expected).norm() <= 10 * attainable * expected.norm()
    residual = b - A @ solution.x
    assert (A @ residual).norm() <= attainable * residual.norm()


def test_warm_start_history_and_dicts():
    A, b = symmetric(10, 10, 20.0, indefinite=True), vector(10)
    exact = torch.linalg.solve(A, b)
    done = minres_qlp(A, b, tol=1e-8, x0=exact)
    assert (done.reason, done.iterations) == ("converged", 0)
    torch.testing.assert_close(minres_qlp(A, b, tol=1e-11, x0=vector(10, 5), max_iters=50).x, exact)
    solution = minres_qlp(A, b, tol=0, max_iters=4, store=(0, 2, 4))
    assert sorted(solution.iterates) == [0, 2, 4]
    assert torch.equal(solution.iterates[2], minres_qlp(A, b, tol=0, max_iters=2).x)
    assert torch.equal(solution.iterates[4], solution.x)
    named = minres_qlp(lambda v: {"a": A @ v["a"]}, {"a": b}, tol=1e-11, max_iters=50)
    torch.testing.assert_close(named.x["a"], exact)


def test_estimates_of_norm_and_condition():
    A, b = symmetric(8, 8, 100.0, indefinite=True), vector(8)
    solution = minres_qlp(A, b, tol=1e-12, max_iters=50)
    assert 0.5 <= solution.matrix_norm <= 2**0.5
    assert 30 <= solution.condition <= 200
    stopped = minres_qlp(A, b, tol=1e-12, max_iters=50, max_condition=5.0)
    assert stopped.reason == "ill_conditioned"
    assert not stopped.converged
    torch.testing.assert_close(stopped.residual_norm, (b - A @ stopped.x).norm())


def test_relative_progress_uses_the_same_model_as_cg():
    A, b = symmetric(120, 120, 1e4), vector(120)
    solution = minres_qlp(A, b, tol=0, max_iters=120, stop=RelativeProgress(epsilon=1e-3, minimum=5))
    assert solution.reason == "relative_progress"
    x = solution.x
    torch.testing.assert_close(solution.model_values[-1], 0.5 * x @ A @ x - b @ x)
    assert len(solution.model_values) == solution.iterations + 1
    assert solution.model_values[-1] > cg(A, b, tol=0, max_iters=solution.iterations).model_values[-1]


def test_broken_numbers_and_preconditioners():
    A, b = symmetric(8, 8, 100.0), vector(8)
    calls = []

    def product(v):
        calls.append(1)
        return A @ v if len(calls) < 4 else v * math.nan

    solution = minres_qlp(product, b, tol=1e-12)
    assert (solution.reason, solution.iterations) == ("non_finite", 3)
    assert torch.equal(solution.x, minres_qlp(A, b, tol=0, max_iters=3).x)
    assert minres_qlp(A, b * math.inf).reason == "non_finite"
    assert minres_qlp(A, b, preconditioner=-torch.eye(8, dtype=b.dtype)).reason == "indefinite_preconditioner"
    mixed = torch.diag(torch.tensor([3.0] * 4 + [-1.0] * 4, dtype=b.dtype))
    assert minres_qlp(A, b, tol=0, preconditioner=mixed).reason in ("indefinite_preconditioner",)
    zero = minres_qlp(A, torch.zeros_like(b), x0=b)
    assert (zero.reason, zero.iterations) == ("zero_rhs", 0)
    assert torch.equal(zero.x, torch.zeros_like(b))


def test_one_reading_of_the_device_per_iteration(monkeypatch):
    """The host reads the coefficients of a Lanczos step at once."""
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(1), original(self))[1])
    A, b = symmetric(10, 10, 100.0), vector(10)
    solution = minres_qlp(A, b, tol=0, max_iters=6, preconditioner=torch.eye(10, dtype=b.dtype))
    assert len(reads) == 1 + solution.iterations
