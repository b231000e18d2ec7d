"""Hessian-free: Newton's step on quadratics, the natural gradient for matching losses, and each part on its own."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from oracles import dense
from oracles.kfac import data, gradient_of, mlp, objective, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.per_example import PerExampleGradients
from natgrad.linalg import RelativeProgress
from natgrad.model_view import ModelView
from natgrad.optim.inner_solve import DiagonalPreconditioner, InnerSolve, LineSearch
from natgrad.optim.newton import KrylovSolver, NewtonModel
from natgrad.optim.objective import Objective

LIKELIHOODS = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "categorical": ng.Categorical()}
EXACT = InnerSolve(max_iters=200, progress=None, store=None)
# Late iterations of CG multiply rounding: paths are compared where that is still small.
SHORT = InnerSolve(max_iters=8)


@pytest.mark.parametrize("exponent", [0.0, 0.75])
def test_on_a_quadratic_one_step_is_enough(exponent: float) -> None:
    model, (x, y) = mlp(4, 3), data(ng.Gaussian(), 4, 3)
    solve = dataclasses.replace(EXACT, exponent=exponent)
    opt = ng.HessianFree(model, ng.Gaussian(), damping=0.0, rule=None, solve=solve)
    opt.step(x, y)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(ones, y).solution.T
    torch.testing.assert_close(torch.cat([model[0].weight, model[0].bias[:, None]], 1), best)
    assert opt.stats["alpha"] == 1 and opt.stats["rho"] == pytest.approx(1.0) and opt.stats["reason"] == "converged"


@pytest.mark.parametrize("family", LIKELIHOODS)
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_a_step_is_the_dense_newton_step(family: str, l2: float) -> None:
    likelihood = LIKELIHOODS[family]
    model, (x, y) = mlp(4, 3, 3), data(likelihood, 4, 3)
    G = ng.GaussNewton(model, likelihood, x, y).to_dense()
    g, before = gradient_of(model, likelihood, x, y, l2), vector(model)
    damped = G + (0.5 + l2) * torch.eye(len(G), dtype=G.dtype)
    expected = -torch.linalg.solve(damped, g)
    at_start = objective(model, likelihood, x, y, l2)
    opt = ng.HessianFree(model, likelihood, damping=0.5, l2=l2, rule=None, solve=EXACT, search=None)
    loss = opt.step(x, y)
    step = vector(model) - before
    torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(at_start - 0.5 * l2 * float(before.square().sum()))
    actual = objective(model, likelihood, x, y, l2) - at_start
    foretold = float(g @ step + 0.5 * step @ damped @ step)
    assert opt.stats["rho"] == pytest.approx(actual / foretold, rel=1e-5)


@pytest.mark.parametrize("family", LIKELIHOODS)
def test_gauss_newton_and_metric_take_identical_steps_for_matching_losses(family: str) -> None:
    likelihood, paths = LIKELIHOODS[family], []
    for curvature in ("gauss_newton", "metric"):
        model, (x, y) = mlp(4, 5, 3), data(likelihood, 4, 3)
        opt = ng.HessianFree(model, likelihood, curvature=curvature, solve=SHORT)
        paths.append(torch.stack([(opt.step(x, y), vector(model))[1] for _ in range(4)]))
    torch.testing.assert_close(paths[0], paths[1], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("family", LIKELIHOODS)
def test_it_is_the_natural_gradient_with_a_line_search(family: str) -> None:
    likelihood, ends = LIKELIHOODS[family], []
    for name in ("HessianFree", "NaturalGradient"):
        model, (x, y) = mlp(4, 5, 3), data(likelihood, 4, 3)
        if name == "HessianFree":
            solve = InnerSolve(max_iters=8, progress=None, warm_start=0.0, exponent=0.0, store=None)
            opt: Any = ng.HessianFree(model, likelihood, damping=0.3, solve=solve)
        else:
            solver = KrylovSolver("cg", tol=0.0, max_iters=8)
            opt = ng.NaturalGradient(model, likelihood, solver=solver, damping=0.3)
        for _ in range(3):
            opt.step(x, y)
            assert opt.stats["accepted"] and opt.stats.get("alpha", 1.0) == 1.0
        ends.append((vector(model), opt.stats["lambda"], opt.stats["rho"]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-8, rtol=1e-6)


class _Quartic(ng.Gaussian):
    """A loss that does not match: ``Σ (z − y)⁴``, whose Gauss-Newton matrix depends on y and is no Fisher matrix."""

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y) ** 4


def test_they_differ_for_a_loss_that_does_not_match() -> None:
    steps = []
    for curvature in ("gauss_newton", "metric"):
        model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
        before = vector(model)
        ng.HessianFree(model, _Quartic(), curvature=curvature, damping=0.1, search=None).step(x, y)
        steps.append(vector(model) - before)
    assert (steps[0] - steps[1]).norm() > 0.1 * steps[0].norm()


def test_micro_batches_are_one_batch_and_counts_that_differ_are_weighed() -> None:
    likelihood = ng.Categorical(normalizer="element", ignore_index=2)
    model, (x, y) = mlp(4, 5, 3), data(likelihood, 4, 3)
    newton = NewtonModel(ModelView(model), likelihood)
    batch = newton.evaluate([(x[:5], y[:5]), (x[5:], y[5:])])
    expected = ng.GaussNewton(model, likelihood, x, y).to_dense()
    torch.testing.assert_close(newton.curvature(batch.parts, 0.0, "gauss_newton").to_dense(), expected)
    parts = newton.parts([(x[:4], y[:4]), (x[4:], y[4:])])
    torch.testing.assert_close(newton.curvature(parts, 0.0, "gauss_newton").to_dense(), expected)
    torch.testing.assert_close(batch.loss, likelihood.nll(model(x), y).detach())
    torch.testing.assert_close(batch.gradient, gradient_of(model, likelihood, x, y))
    paths = []
    for size in (None, 5):
        model = mlp(4, 5, 3)
        opt = ng.HessianFree(model, likelihood, solve=SHORT)
        paths.append([(opt.step(x, y, micro_batch_size=size), vector(model))[1] for _ in range(3)][-1])
    torch.testing.assert_close(paths[0], paths[1])


def test_the_objective_elsewhere_and_back() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Bernoulli(), 4, 3)
    newton = NewtonModel(ModelView(model), ng.Bernoulli())
    h = Objective(newton, newton.parts([(x[:4], y[:4]), (x[4:], y[4:])]), 0.1)
    before, offset = vector(model), 0.1 * torch.randn(43, dtype=torch.float64)
    value, (again, gradient) = h.at(offset), h.gradient_at(offset)
    assert torch.equal(vector(model), before)
    nn.utils.vector_to_parameters(before + offset, model.parameters())
    assert float(value) == pytest.approx(objective(model, ng.Bernoulli(), x, y, 0.1))
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(gradient, gradient_of(model, ng.Bernoulli(), x, y, 0.1))
    with pytest.raises(KeyboardInterrupt), newton.displaced(offset):
        raise KeyboardInterrupt
    torch.testing.assert_close(vector(model), before + offset, rtol=0, atol=0)


def test_dropout_draws_the_same_masks_whenever_h_is_evaluated() -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    x, y = data(ng.Gaussian(), 4, 3)
    newton = NewtonModel(ModelView(model), ng.Gaussian())
    batch = newton.evaluate([(x, y)])
    h, zero = Objective(newton, batch.parts), torch.zeros_like(batch.gradient)
    torch.testing.assert_close(h.at(zero), batch.loss)
    again, gradient = h.gradient_at(zero)
    torch.testing.assert_close(again, batch.loss)
    torch.testing.assert_close(gradient, batch.gradient)


@pytest.mark.parametrize("name", ["mlp", "sequence", "conv"])
def test_the_preconditioner_is_the_diagonal_of_the_empirical_fisher(name: str) -> None:
    from oracles import networks

    case = networks.case(name)
    y = networks.targets("bernoulli", case.z)
    found = DiagonalPreconditioner(PerExampleGradients(ModelView(case.model)), ng.Bernoulli(), [(case.x, y)])
    R = dense.per_example_gradients(case.model, case.x, y, dense.nll("bernoulli"))
    torch.testing.assert_close(found.diagonal, R.square().mean(0))
    r = torch.randn_like(found.diagonal)
    expected = r / (R.square().mean(0) + 0.3) ** 0.75
    torch.testing.assert_close(found.inverse(torch.tensor(0.3), 0.75)(r), expected)


def test_the_solver_goes_on_from_the_step_before() -> None:
    likelihood, iterations = ng.Bernoulli(), {}
    for warm_start in (0.0, 1.0):
        model, (x, y) = mlp(4, 6, 6, 3), data(likelihood, 4, 3, n=40)
        solve = InnerSolve(200, None, warm_start, 0.0, None)
        opt = ng.HessianFree(model, likelihood, lr=1e-8, damping=0.1, rule=None, solve=solve)
        opt.step(x, y)
        before = opt._previous.clone()
        opt.step(x, y)  # the parameters hardly moved: the solution is the same
        torch.testing.assert_close(opt._previous, before, atol=1e-6, rtol=1e-6)
        iterations[warm_start] = opt.stats["iterations"]
    assert iterations[1.0] < 0.7 * iterations[0.0]


def test_backtracking_takes_the_stored_iterate_from_which_going_back_is_worse() -> None:
    torch.manual_seed(3)
    model, (x, y) = mlp(4, 8, 3, seed=3), data(ng.Bernoulli(), 4, 3)
    for p in model.parameters():
        p.data.mul_(4)
    twin = mlp(4, 8, 3, seed=3)
    twin.load_state_dict(model.state_dict())
    solve = InnerSolve(30, None, 0.0, 0.0)
    opt = ng.HessianFree(model, ng.Bernoulli(), damping=1e-3, solve=solve, search=None, rule=None)
    newton = NewtonModel(ModelView(twin), ng.Bernoulli())
    batch = newton.evaluate([(x, y)])
    h, damped = Objective(newton, batch.parts), newton.curvature(batch.parts, 1e-3, "gauss_newton")
    stored = ng.linalg.cg(
        damped, -batch.gradient, tol=1e-10, max_iters=30, store=ng.linalg.geometric_indices(30)
    ).iterates
    values = {i: float(h.at(step)) for i, step in stored.items()}
    best = max(stored)
    for i in sorted(stored, reverse=True)[1:]:
        if values[i] >= values[best]:
            break
        best = i
    before = vector(model)
    opt.step(x, y)
    assert opt.stats["taken"] == best < max(stored)  # an example in which it matters
    torch.testing.assert_close(vector(model) - before, stored[best])


def test_line_search_is_armijos() -> None:
    search = LineSearch(shrink=0.5, slope=0.1, trials=10)
    assert search(lambda a: a, 0.0, -1.0, -1.0) == (1.0, -1.0)
    # h(α) = 4α² − α: the first power of ½ with 4α² − α ≤ −0.1 α is 1/8
    assert search(lambda a: 4 * a * a - a, 0.0, 3.0, -1.0) == (0.125, 4 / 64 - 1 / 8)
    assert search(lambda a: 1.0, 0.0, math.nan, -1.0) == (0.0, 0.0)
    assert search(lambda a: math.inf if a > 0.3 else -a, 0.0, math.inf, -1.0) == (0.25, -0.25)


def test_damping_follows_rho_and_rejected_steps_change_nothing() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Bernoulli(), 4, 3)
    opt = ng.HessianFree(model, ng.Bernoulli(), damping=1.0)
    opt.step(x, y)
    assert opt.stats["rho"] > 0.75 and opt.stats["lambda"] == pytest.approx(2 / 3)
    opt.search = LineSearch(slope=0.999999, trials=1)  # asks for more than curvature leaves
    before = vector(model)
    opt.step(x, y)
    assert torch.equal(vector(model), before)
    assert opt.stats["rejected"] == 1 and not opt.stats["accepted"] and opt.stats["step_norm"] == 0


def test_the_first_damping_is_a_share_of_the_curvature_along_the_gradient() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Bernoulli(), 4, 3)
    g = gradient_of(model, ng.Bernoulli(), x, y)
    G = ng.GaussNewton(model, ng.Bernoulli(), x, y).to_dense()
    opt = ng.HessianFree(model, ng.Bernoulli(), start=0.2, rule=None)
    opt.step(x, y)
    assert opt.stats["lambda"] == pytest.approx(float(0.2 * (g @ G @ g) / (g @ g)))


@pytest.mark.parametrize("exponent", [0.0, 0.75])
def test_a_first_batch_that_overflows_leaves_the_first_damping_to_the_next(exponent: float) -> None:
    """λ became infinite or arbitrary, and stayed so: curvature_batch not a number, and a product beyond float32."""
    x, y = (t.float() for t in data(ng.Gaussian(), 4, 3))
    for bad in (math.nan, 1e25):
        model = mlp(4, 3).float()
        opt = ng.HessianFree(model, ng.Gaussian(), rule=None, solve=ng.InnerSolve(exponent=exponent))
        opt.step(x, y, curvature_batch=(bad * x, y))
        assert not opt.stats["accepted"] and math.isnan(opt.stats["lambda"])
        g = gradient_of(model, ng.Gaussian(), x, y)
        G = ng.GaussNewton(model, ng.Gaussian(), x, y)
        opt.step(x, y)
        assert opt.stats["accepted"]
        assert opt.stats["lambda"] == pytest.approx(float(0.1 * torch.dot(g, G @ g) / torch.dot(g, g)), rel=1e-5)
    model = mlp(4, 3).float()
    opt = ng.HessianFree(model, ng.Gaussian(), solve=ng.InnerSolve(exponent=exponent))
    outlier = x.clone()
    outlier[0] *= 1e9  # a gradient whose product with G is finite, but not its square
    opt.step(outlier, y)
    assert math.isfinite(opt.stats["lambda"])


def test_the_curvature_of_another_batch_and_of_some_examples() -> None:
    likelihood = ng.Bernoulli()
    model, (x, y) = mlp(4, 3, 3), data(likelihood, 4, 3)
    other, answers = data(likelihood, 4, 3, n=7, seed=5)
    g, before = gradient_of(model, likelihood, x, y), vector(model)
    plain = {"damping": 0.5, "rule": None, "solve": EXACT, "search": None}
    G = ng.GaussNewton(model, likelihood, other, answers).to_dense()
    ng.HessianFree(model, likelihood, **plain).step(x, y, curvature_batch=(other, answers))
    expected = -torch.linalg.solve(G + 0.5 * torch.eye(len(G), dtype=G.dtype), g)
    torch.testing.assert_close(vector(model) - before, expected, atol=1e-6, rtol=1e-5)
    nn.utils.vector_to_parameters(before.clone(), model.parameters())
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(2))[:6].sort().values
    G = ng.GaussNewton(model, likelihood, x[rows], y[rows]).to_dense()
    ng.HessianFree(model, likelihood, share=0.5, seed=2, **plain).step(x, y)
    expected = -torch.linalg.solve(G + 0.5 * torch.eye(len(G), dtype=G.dtype), g)
    torch.testing.assert_close(vector(model) - before, expected, atol=1e-6, rtol=1e-5)


class _Concave(ng.Gaussian):
    """A "loss" whose curvature in z is negative."""

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        return -0.5 * (z - y) ** 2


class _Spoilt(ng.Gaussian):
    """A Fisher product that is not finite."""

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return v * math.nan


def test_indefinite_systems_and_products_that_are_not_finite_are_reported() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    before = vector(model)
    opt = ng.HessianFree(model, _Concave(), damping=0.1)
    opt.step(x, y)
    assert opt.stats["reason"] == "negative_curvature" and not opt.stats["accepted"]
    assert opt.stats["lambda"] == pytest.approx(0.15) and torch.equal(vector(model), before)
    opt = ng.HessianFree(model, _Spoilt(), damping=0.1, curvature="metric")
    opt.step(x, y)
    assert opt.stats["reason"] == "non_finite" and opt.stats["rejected"] == 1 and opt.stats["skipped"] == 0
    assert torch.equal(vector(model), before)


class _NoMetric:
    """A loss and nothing else."""

    def nll(self, z: Tensor, y: Tensor, **_: Any) -> Tensor:
        return (z - y).abs().mean()


def test_bad_settings_and_models_are_named() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    for settings, message in [
        ({"curvature": "hessian"}, "curvature='hessian': expected one of 'gauss_newton', 'metric'"),
        ({"damping": -1.0}, "damping=-1"),
        ({"damping": math.nan}, "damping=nan"),
        ({"start": 0.0}, "start=0"),
        ({"l2": -1.0}, "l2=-1"),
        ({"share": 0.0}, "share=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ng.HessianFree(model, ng.Gaussian(), **settings)
    for make, message in [
        (lambda: InnerSolve(max_iters=0), "max_iters=0"),
        (lambda: InnerSolve(warm_start=2.0), "warm_start=2"),
        (lambda: InnerSolve(exponent=-1.0), "exponent=-1"),
        (lambda: InnerSolve(store=1.0), "store=1"),
        (lambda: InnerSolve(progress=RelativeProgress(epsilon=0.0)), "epsilon"),
        (lambda: LineSearch(shrink=1.0), "shrink"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="which lacks count, fisher_product"):
        ng.HessianFree(model, _NoMetric())  # type: ignore
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match=r"BatchNorm1d.*InnerSolve\(exponent=0\) does without"):
        ng.HessianFree(normed, ng.Gaussian()).step(x, y)
    opt = ng.HessianFree(normed, ng.Gaussian(), solve=InnerSolve(exponent=0.0))
    first = opt.step(x, y)
    assert normed[1].num_batches_tracked == 1 and opt.step(x, y) < first
