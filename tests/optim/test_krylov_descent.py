"""Krylov subspace descent: the basis against dense powers, CG's minimiser on quadratics, the second batch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.kfac import data, gradient_of, mlp, objective, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad import SubspaceSearch
from natgrad.linalg import cg
from natgrad.linalg.krylov_basis import krylov_basis


def system(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A positive semi-definite matrix, a right-hand side, and a positive diagonal."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    return root @ root.T / n, b, torch.rand(n, generator=generator, dtype=torch.float64) + 0.5


@given(
    n=st.integers(2, 12), size=st.integers(1, 6), diagonal=st.booleans(), extra=st.booleans(), seed=st.integers(0, 9)
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_the_basis_spans_the_dense_krylov_subspace(n: int, size: int, diagonal: bool, extra: bool, seed: int) -> None:
    A, b, d = system(n, seed)
    M = torch.diag(d) if diagonal else torch.eye(n, dtype=torch.float64)
    more = torch.arange(1.0, n + 1, dtype=torch.float64) if extra else None
    found = krylov_basis(lambda v: A @ v, b, size, (lambda r: r / d) if diagonal else None, more)
    V = found.vectors
    powers = [torch.linalg.solve(M, b)]
    for _ in range(size - 1):
        powers.append(torch.linalg.solve(M, A @ powers[-1]))
    K = torch.stack([p / p.norm() for p in [*powers, *([more] if more is not None else [])]], 1)
    kept = V[:, V.any(0)]
    assert found.rank == kept.shape[1] == min(n, size + extra)
    torch.testing.assert_close(kept.T @ kept, torch.eye(found.rank, dtype=torch.float64))
    torch.testing.assert_close(kept @ (kept.T @ K), K, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found.matrix, V.T @ A @ V)


def test_whitened_coordinates_make_the_matrix_the_identity() -> None:
    A, b, _ = system(9, 1)
    B = krylov_basis(lambda v: A @ v, b, 5).whitened(1e-12)
    torch.testing.assert_close(B.T @ A @ B, torch.eye(5, dtype=torch.float64))
    # eigenvalues below the floor are raised to it: the matrix is then smaller than the identity there
    flat = krylov_basis(lambda v: torch.zeros_like(v), b, 3)
    assert flat.rank == 1 and torch.isfinite(flat.whitened()).all()
    values = torch.linalg.eigvalsh(krylov_basis(lambda v: A @ v, b, 5).whitened(0.5).T @ A @ B)
    assert values.min() < 0.99


def test_an_exhausted_subspace_has_zero_columns_and_no_rounding_in_them() -> None:
    A = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    b = torch.ones(5, dtype=torch.float64)
    found = krylov_basis(lambda v: A @ v, b, 4, extra=b)
    assert found.rank == 2 and not found.vectors[:, 2:].any()
    with pytest.raises(ValueError, match="size=0"):
        krylov_basis(lambda v: A @ v, b, 0)


EXACT = {"floor": 1e-12, "iterations": 200, "evaluations": 400}


@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_on_a_quadratic_it_takes_conjugate_gradients_minimiser_over_the_subspace(size: int, exponent: float) -> None:
    model, (x, y) = mlp(4, 3), data(ng.Gaussian(), 4, 3)
    g, before = gradient_of(model, ng.Gaussian(), x, y), vector(model)
    H = ng.GaussNewton(model, ng.Gaussian(), x, y)
    R = x.new_zeros(0)
    if exponent:
        residual = (model(x) - y).detach()
        ones = torch.cat([x, torch.ones(12, 1, dtype=x.dtype)], 1)
        weight = residual.square().T @ ones.square() / 12
        R = torch.cat([weight[:, :-1].reshape(-1), weight[:, -1]])
        R = R + 1e-12 * R.max()
    expected = cg(H, -g, tol=0.0, max_iters=size, preconditioner=(lambda r: r / R) if exponent else None).x
    search = SubspaceSearch(size=size, exponent=exponent, **EXACT)
    opt = ng.KrylovDescent(model, ng.Gaussian(), share=1.0, search=search)
    opt.step(x, y)
    torch.testing.assert_close(vector(model) - before, expected, atol=1e-6, rtol=1e-5)
    assert opt.stats["dimension"] == size


@pytest.mark.parametrize("width", [4, 60])
@pytest.mark.parametrize("share, dimension", [(0.25, 1 + 3 * 2), (0.5, 1 + 6 * 2)])
def test_a_subspace_that_is_exhausted_ends_there(share: float, dimension: int, width: int) -> None:
    """G of n examples and three classes has the rank 2 n; directions of rounding errors once made it up to ``size``."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 3)).double()
        x, y = torch.randn(12, 8, dtype=torch.float64), torch.randint(3, (12,))
        opt = ng.KrylovDescent(model, ng.Categorical(), share=share, search=SubspaceSearch(exponent=0.0))
        opt.step(x, y)
        # errors of the products before may be left as one direction more
        assert dimension <= opt.stats["dimension"] <= dimension + 1


@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 1e-9, 1e-30])
def test_the_step_goes_with_the_scale_of_the_targets(scale: float, exponent: float) -> None:
    """The tolerances of L-BFGS are absolute: targets of 1e-8 moved nothing."""
    x, y = data(ng.Gaussian(), 4, 3)
    steps = []
    for factor in (1.0, scale):
        model = mlp(4, 3)
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        opt = ng.KrylovDescent(model, ng.Gaussian(), search=SubspaceSearch(size=6, exponent=exponent))
        opt.step(x[:8], factor * y[:8], search_batch=(x[4:], factor * y[4:]))
        steps.append(vector(model) / factor)
    assert torch.linalg.vector_norm(steps[0]) > 0.1
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-5)


def test_the_step_before_is_part_of_the_subspace() -> None:
    model, (x, y) = mlp(4, 3), data(ng.Gaussian(), 4, 3)
    search = SubspaceSearch(size=1, exponent=0.0, **EXACT)
    opt = ng.KrylovDescent(model, ng.Gaussian(), share=1.0, search=search)
    start = vector(model)
    opt.step(x, y)
    g = gradient_of(model, ng.Gaussian(), x, y)
    opt.step(x, y)
    # one gradient step, then the best in span{g, δ₀}: as two iterations of CG
    H = ng.GaussNewton(model, ng.Gaussian(), x, y)
    nn.utils.vector_to_parameters(start.clone(), model.parameters())
    two = cg(H, -gradient_of(model, ng.Gaussian(), x, y), tol=0.0, max_iters=2).x
    nn.utils.vector_to_parameters((start + two).clone(), model.parameters())
    assert opt.stats["dimension"] == 2 and g.norm() > 0
    best = objective(model, ng.Gaussian(), x, y)
    nn.utils.vector_to_parameters(start.clone(), model.parameters())
    again = ng.KrylovDescent(model, ng.Gaussian(), share=1.0, search=search)
    again.step(x, y)
    again.step(x, y)
    assert objective(model, ng.Gaussian(), x, y) == pytest.approx(best, rel=1e-8)


def test_the_search_lowers_the_loss_of_the_second_batch() -> None:
    likelihood = ng.Bernoulli()
    model, (x, y) = mlp(4, 5, 3), data(likelihood, 4, 3, n=30)
    second = data(likelihood, 4, 3, n=20, seed=9)
    opt = ng.KrylovDescent(model, likelihood, l2=0.01)
    before = objective(model, likelihood, *second, 0.01)
    opt.step(x, y, search_batch=second)
    reduction = before - objective(model, likelihood, *second, 0.01)
    assert reduction > 0 and opt.stats["reduction"] == pytest.approx(reduction)


def test_without_a_second_batch_the_rest_of_the_first_is_it() -> None:
    likelihood = ng.Bernoulli()
    model, (x, y) = mlp(4, 5, 3), data(likelihood, 4, 3, n=20)
    rest = torch.randperm(20, generator=torch.Generator().manual_seed(4))[5:].sort().values
    before = objective(model, likelihood, x[rest], y[rest])
    opt = ng.KrylovDescent(model, likelihood, share=0.25, seed=4)
    opt.step(x, y)
    assert opt.stats["reduction"] == pytest.approx(before - objective(model, likelihood, x[rest], y[rest]))


@pytest.mark.parametrize("family", ["gaussian", "bernoulli", "categorical"])
def test_gauss_newton_and_metric_take_identical_steps_for_matching_losses(family: str) -> None:
    likelihood = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "categorical": ng.Categorical()}[family]
    ends = []
    for curvature in ("gauss_newton", "metric"):
        model, (x, y) = mlp(4, 5, 3), data(likelihood, 4, 3)
        opt = ng.KrylovDescent(model, likelihood, curvature=curvature, search=SubspaceSearch(size=4))
        opt.step(x, y)
        ends.append(vector(model))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-7, rtol=1e-6)


def test_a_second_batch_that_confirms_nothing_leaves_the_parameters() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    perfect = (x, model(x).detach())
    before = vector(model)
    opt = ng.KrylovDescent(model, ng.Gaussian())
    opt.step(x, y, search_batch=perfect)
    assert torch.equal(vector(model), before) and opt.stats["rejected"] == 1
    assert opt.stats["reason"] == "no_decrease" and not opt.stats["accepted"]
    opt.step(x, y, search_batch=(x * math.nan, y))
    assert opt.stats["reason"] == "non_finite" and not opt.stats["accepted"]
    assert torch.equal(vector(model), before) and opt.stats["rejected"] == 2


class _Spoilt(ng.Gaussian):
    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return v * math.nan


def test_products_that_are_not_finite_and_zero_gradients_are_reported() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    before = vector(model)
    opt = ng.KrylovDescent(model, _Spoilt(), curvature="metric")
    opt.step(x, y)
    assert opt.stats["reason"] == "non_finite_products" and torch.equal(vector(model), before)
    for make in (ng.KrylovDescent, ng.HessianFree):
        opt = make(model, ng.Gaussian())
        assert opt.step(x, model(x).detach()) == 0
        assert opt.stats["reason"] == "zero_gradient" and torch.equal(vector(model), before)
        assert opt.stats["rejected"] == 0 and opt.stats["skipped"] == 0


def test_bad_settings_are_named() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"curvature": "fisher"}, "curvature='fisher'"),
        ({"share": 1.5}, "share=1.5"),
        ({"l2": math.nan}, "l2=nan"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ng.KrylovDescent(model, ng.Gaussian(), **arguments)
    for name in ("size", "iterations", "evaluations"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            SubspaceSearch(**{name: 0})
    with pytest.raises(ValueError, match="floor between 0 and 1"):
        SubspaceSearch(floor=0.0)
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match=r"BatchNorm1d.*SubspaceSearch\(exponent=0\) does without"):
        ng.KrylovDescent(normed, ng.Gaussian()).step(x, y)
