"""Conjugate gradients against dense solutions and SciPy; stop reasons; what bad systems get."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg.systems import symmetric, vector
from scipy.sparse.linalg import cg as scipy_cg

import natgrad as ng
from natgrad.linalg import RelativeProgress, cg, geometric_indices


@pytest.mark.parametrize("seed", range(100))
def test_equals_the_dense_solution_and_scipy(seed):
    n = 1 + seed % 23
    condition = 10 ** (seed % 5)
    A, b = symmetric(n, n, condition, seed=seed), vector(n, seed)
    solution = cg(A, b, tol=1e-10, max_iters=30 * n + 100)
    assert solution.reason == "converged"
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-8 * condition, atol=1e-8 * condition)
    torch.testing.assert_close(solution.residual_norm, (b - A @ solution.x).norm(), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(solution.residual, b - A @ solution.x, rtol=1e-3, atol=1e-11)
    reference, info = scipy_cg(A.numpy(), b.numpy(), rtol=1e-10, maxiter=30 * n + 100)
    assert info == 0
    torch.testing.assert_close(solution.x, torch.from_numpy(reference), rtol=1e-8 * condition, atol=1e-8 * condition)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_every_iterate_is_that_of_scipy(iterations):
    A, b = symmetric(12, 12, 50.0), vector(12)
    reference, _ = scipy_cg(A.numpy(), b.numpy(), rtol=0, maxiter=iterations)
    solution = cg(A, b, tol=0, max_iters=iterations)
    assert (solution.reason, solution.iterations) == ("max_iters", iterations)
    torch.testing.assert_close(solution.x, torch.from_numpy(reference))


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_preconditioned_iterates_are_those_of_scipy(iterations):
    A, b = symmetric(12, 12, 1e3), vector(12)
    M = symmetric(12, 12, 30.0, seed=7)
    reference, _ = scipy_cg(A.numpy(), b.numpy(), rtol=0, maxiter=iterations, M=M.numpy())
    solution = cg(A, b, tol=0, max_iters=iterations, preconditioner=M)
    torch.testing.assert_close(solution.x, torch.from_numpy(reference))
    torch.testing.assert_close(solution.residual_norm, (b - A @ solution.x).norm())


def test_the_inverse_as_preconditioner_needs_one_iteration():
    A, b = symmetric(9, 9, 1e4), vector(9)
    solution = cg(A, b, tol=1e-8, preconditioner=torch.linalg.inv(A))
    assert (solution.reason, solution.iterations) == ("converged", 1)


@given(n=st.integers(1, 15), k=st.integers(0, 4), seed=st.integers(0, 100))
def test_model_values_are_those_of_the_iterates(n, k, seed):
    A, b, x0 = symmetric(n, n, 20.0, seed=seed), vector(n, seed), vector(n, seed + 1)
    solution = cg(A, b, tol=1e-12, max_iters=k, x0=x0, store=range(k + 1))
    assert sorted(solution.iterates) == list(range(solution.iterations + 1))
    assert len(solution.model_values) == solution.iterations + 1
    for i, x in solution.iterates.items():
        torch.testing.assert_close(solution.model_values[i], 0.5 * x @ A @ x - b @ x, atol=1e-9, rtol=1e-9)
    assert torch.equal(solution.iterates[solution.iterations], solution.x)


def test_warm_start_counts_from_there():
    A, b = symmetric(8, 8, 5.0), vector(8)
    exact = torch.linalg.solve(A, b)
    start = exact.clone()
    solution = cg(A, b, tol=1e-8, x0=start)
    assert (solution.reason, solution.iterations) == ("converged", 0)
    cold, warm = cg(A, b, tol=1e-3), cg(A, b, tol=1e-3, x0=exact + 1e-3)
    assert warm.iterations < cold.iterations
    assert torch.equal(start, exact)


def test_dict_and_shaped_tensors():
    A, b = symmetric(10, 10, 5.0), vector(10)
    parts = {"w": b[:6].reshape(2, 3), "b": b[6:]}

    def product(v):
        flat = A @ torch.cat([v["w"].reshape(-1), v["b"]])
        return {"b": flat[6:], "w": flat[:6].reshape(2, 3)}  # another order of keys

    expected = torch.linalg.solve(A, b)
    solution = cg(product, parts, tol=1e-12, x0={"b": b[6:], "w": b[:6].reshape(2, 3)}, store=[0])
    assert list(solution.x) == ["w", "b"]
    torch.testing.assert_close(solution.x["w"], expected[:6].reshape(2, 3))
    torch.testing.assert_close(solution.x["b"], expected[6:])
    torch.testing.assert_close(solution.iterates[0]["b"], b[6:])
    shaped = cg(lambda v: (A @ v.reshape(-1)).reshape(5, 2), b.reshape(5, 2), tol=1e-12)
    torch.testing.assert_close(shaped.x, expected.reshape(5, 2))


def test_negative_curvature_is_reported_with_its_direction():
    A = torch.diag(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    solution = cg(A, b, tol=1e-8)
    p = solution.direction
    assert solution.reason == "negative_curvature"
    assert not solution.converged
    assert p @ A @ p < 0
    torch.testing.assert_close(solution.curvature, (p @ A @ p) / (p @ p))
    torch.testing.assert_close(solution.residual_norm, (b - A @ solution.x).norm())
    at_once = cg(-A, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert (at_once.reason, at_once.iterations, float(at_once.curvature)) == ("negative_curvature", 0, -2.0)
    assert torch.equal(at_once.x, torch.zeros(3, dtype=torch.float64))


def test_no_direction_where_the_matrix_is_definite():
    solution = cg(symmetric(5, 5), vector(5))
    assert solution.direction is None
    assert solution.curvature is None


@pytest.mark.parametrize("every", [1, 4, 100])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_product_that_is_not_finite_ends_at_the_last_good_iterate(every, broken):
    A, b = symmetric(8, 8, 100.0), vector(8)
    calls = []

    def product(v):
        calls.append(1)
        return A @ v if len(calls) < 4 else torch.full_like(v, broken)

    solution = cg(product, b, tol=1e-12, check_every=every)
    assert (solution.reason, solution.iterations) == ("non_finite", 3)
    assert torch.equal(solution.x, cg(A, b, tol=1e-12, max_iters=3).x)


@pytest.mark.parametrize("every", [3, 50])
def test_asking_less_often_gives_the_same_solution(every):
    A, b = symmetric(15, 15, 50.0), vector(15)
    often, seldom = cg(A, b, store=range(30)), cg(A, b, store=range(30), check_every=every)
    assert often.reason == seldom.reason == "converged"
    assert often.iterations == seldom.iterations < 20
    assert torch.equal(often.x, seldom.x)
    assert often.iterates.keys() == seldom.iterates.keys()
    assert len(often.model_values) == len(seldom.model_values)
    indefinite = symmetric(15, 15, 50.0, indefinite=True)
    often, seldom = cg(indefinite, b, tol=1e-9), cg(indefinite, b, tol=1e-9, check_every=every)
    assert often.reason == seldom.reason == "negative_curvature"
    assert torch.equal(often.direction, seldom.direction)
    assert torch.equal(often.x, seldom.x)


def test_zero_and_broken_right_hand_sides():
    A, b = symmetric(4, 4), torch.zeros(4, dtype=torch.float64)
    zero = cg(A, b, x0=vector(4))
    assert (zero.reason, zero.iterations, zero.converged) == ("zero_rhs", 0, True)
    assert torch.equal(zero.x, b)
    assert float(zero.relative_residual) == 0
    broken = cg(A, torch.full((4,), math.nan, dtype=torch.float64))
    assert (broken.reason, broken.iterations) == ("non_finite", 0)
    assert torch.equal(broken.x, b)


def test_preconditioners_that_are_none():
    A, b = symmetric(6, 6), vector(6)
    assert cg(A, b, preconditioner=-torch.eye(6, dtype=b.dtype)).reason == "indefinite_preconditioner"
    broken = cg(A, b, preconditioner=lambda r: r / 0)
    assert broken.reason == "non_finite"
    assert torch.equal(broken.x, torch.zeros_like(b))


def test_relative_progress_stops_where_the_published_rule_says():
    A, b = symmetric(200, 200, 1e4), vector(200)
    rule = RelativeProgress(epsilon=1e-3, minimum=5)
    solution = cg(A, b, tol=0, max_iters=200, stop=rule)
    assert solution.reason == "relative_progress"
    assert solution.converged
    values = [float(value) for value in cg(A, b, tol=0, max_iters=solution.iterations).model_values]

    def stops(i):
        k = max(5, int(0.1 * i))
        return i > k and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * 1e-3

    assert [i for i in range(len(values)) if stops(i)] == [solution.iterations]


def test_a_rule_of_ones_own():
    class Third:
        name, needs_model = "third", False

        def __call__(self, progress):
            return progress.iteration == 3

    assert cg(symmetric(9, 9, 100.0), vector(9), tol=0, stop=[Third()]).reason == "third"


def test_products_may_return_their_argument():
    b = vector(5)
    solution = cg(lambda v: v, b, preconditioner=lambda r: r)
    torch.testing.assert_close(solution.x, b)
    assert solution.iterations == 1


def test_nothing_is_changed_and_gradients_are_left_alone():
    A, b = symmetric(5, 5), vector(5).requires_grad_()
    leaf = A.clone().requires_grad_()

    def product(v):
        assert torch.is_grad_enabled()
        return leaf @ v

    before = b.detach().clone()
    solution = cg(product, b)
    assert torch.equal(b, before)
    assert not solution.x.requires_grad
    assert torch.is_grad_enabled()


def test_operators_of_the_library():
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    fisher = ng.Fisher(model, ng.Gaussian(), torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double())
    b = vector(8)
    torch.testing.assert_close(cg(fisher, b, tol=1e-10).x, torch.linalg.solve(fisher.to_dense(), b))
    named = fisher.domain.to_dict(b)
    torch.testing.assert_close(fisher.domain.to_vector(cg(fisher, named, tol=1e-10).x), cg(fisher, b, tol=1e-10).x)


def test_geometric_indices():
    assert geometric_indices(10) == (1, 2, 3, 4, 5, 7, 9)
    assert geometric_indices(0) == ()
    with pytest.raises(ValueError, match="factor=1.0"):
        geometric_indices(5, 1.0)


@pytest.mark.parametrize("solver", [cg, ng.linalg.minres_qlp])
def test_bad_arguments_are_named(solver):
    A, b = symmetric(4, 4), vector(4)
    with pytest.raises(ValueError, match="tol=-1"):
        solver(A, b, tol=-1.0)
    with pytest.raises(ValueError, match="max_iters=-3"):
        solver(A, b, max_iters=-3)
    with pytest.raises(ValueError, match=r"x0: expected the form of b, shape \[4\]; got shape \[3\]"):
        solver(A, b, x0=b[:3])
    with pytest.raises(ValueError, match=r"matvec\(v\).*shape \[4\]; got shape \[2\]"):
        solver(lambda v: v[:2], b)
    with pytest.raises(ValueError, match=r"preconditioner\(r\)"):
        solver(A, b, preconditioner=lambda v: v[:2])
    with pytest.raises(TypeError, match="matvec: expected a callable"):
        solver(3, b)
    with pytest.raises(TypeError, match=r"b: expected real.*int64"):
        solver(A, torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="b: expected a tensor or a dict"):
        solver(A, [1.0, 2.0])
    with pytest.raises(TypeError, match=r"matvec\(v\): expected a tensor"):
        solver(lambda v: None, b)
    with pytest.raises(ValueError, match=r"matvec: expected a matrix of shape \[4, 4\] .*float64.*; got \[3, 3\]"):
        solver(A[:3, :3], b)
    with pytest.raises(ValueError, match=r"preconditioner: expected a matrix .*float64.*; got \[4, 4\], torch.float32"):
        solver(A, b, preconditioner=A.float())
    with pytest.raises(ValueError, match=r"matvec: a matrix multiplies vectors; b is \{'v': \[4\]\}: pass a function"):
        solver(A, {"v": b})
    with pytest.raises(TypeError, match="stop=.*expected a rule such as natgrad.linalg.RelativeProgress"):
        solver(A, b, stop=lambda progress: True)
    assert solver(A, b[:, None], tol=1e-9).x.shape == (4, 1)
