"""How K-FAC finds and moves λ and γ, and the published constants."""

import math
from typing import Any

import pytest
import torch
from oracles.kfac import (
    EVERY_ROW,
    FIXED,
    NO_UPDATE,
    data,
    dense_factors,
    dense_proposal,
    dense_update,
    gradient_of,
    mlp,
    moved,
    objective,
    vector,
)

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.settings import Damping, Periods, Subsets

FORMS = [ExactTikhonov(), FactoredTikhonov()]
by_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)


@pytest.mark.parametrize("l2", [0.0, 0.02])
@pytest.mark.parametrize("likelihood", [ng.Gaussian(1e-3), ng.Bernoulli(), ng.Categorical("none")], ids=repr)
def test_lambda_starts_at_a_share_of_the_mean_eigenvalue_and_once(likelihood: Any, l2: float) -> None:
    model = mlp(4, 3, 3)
    x, y = data(likelihood, 4, 3)
    opt = ng.KFAC(model, likelihood, damping=Damping(rule=None, ratio=8.0, start=0.5), l2=l2)
    assert math.isnan(opt._lam)
    opt.step(x, y)
    blocks = [block.to_dense() for block in opt._running.factors.values()]
    mean = sum(block.trace() for block in blocks) / sum(len(block) for block in blocks)
    assert opt.stats["lambda"] == pytest.approx(0.5 * mean.item(), rel=1e-12)
    assert opt.stats["gamma"] == pytest.approx(8 * math.sqrt(0.5 * mean + l2), rel=1e-12)
    first = opt.stats["lambda"]
    opt.step(100 * x, y)  # another λ would be the share of this batch
    assert opt.stats["lambda"] == first or not opt.stats["accepted"]


def test_a_given_lambda_is_taken_as_it_is() -> None:
    likelihood, model = ng.Bernoulli(), mlp(4, 5, 3)
    for damping in (0.37, Damping(0.37, rule=None)):
        opt = ng.KFAC(model, likelihood, damping=damping, guard=NO_UPDATE, l2=0.01)
        assert opt._lam == 0.37
        opt.step(*data(likelihood, 4, 3))
        assert opt.stats["gamma"] == pytest.approx(4 * math.sqrt(0.38), rel=1e-12)
        assert damping == 0.37 or opt.stats["lambda"] == 0.37


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_first_batch_postpones_the_start(bad: float) -> None:
    """Nothing is sampled here (one layer with a known G), so that what follows can be compared bit for bit."""
    likelihood, models = ng.Gaussian(), [mlp(4, 3), mlp(4, 3)]
    settings = {"subsets": EVERY_ROW, "periods": Periods(inverses=1)}
    broken, clean = (ng.KFAC(model, likelihood, **settings) for model in models)
    start, (x, y) = vector(models[0]), data(likelihood, 4, 3)
    wrong = x.clone()
    wrong[2, 1] = bad
    for times in (1, 2):
        assert not math.isfinite(broken.step(wrong, y))
        assert broken.stats["skipped"] == times and broken.stats["rejected"] == 0 and not broken.stats["accepted"]
        assert torch.equal(start, vector(models[0])) and not broken._previous.any()
        assert math.isnan(broken._lam) and math.isnan(broken._gamma)
        assert all(not block.to_dense().any() for block in broken._running.factors.values())
    for _ in range(3):
        assert broken.step(x, y) == clean.step(x, y)
    assert torch.equal(*(vector(model) for model in models))
    for name in ("lambda", "gamma", "alpha", "mu", "rho"):
        assert broken.stats[name] == clean.stats[name]


@by_form
def test_gamma_is_tied_to_lambda_and_an_inverse_is_as_old_as_its_decomposition(form: Any) -> None:
    """The exact form takes the present γ in the eigenbasis of the last refresh, a factored inverse keeps its old γ."""
    likelihood, model, l2, ratio = ng.Bernoulli(), mlp(4, 3, 3), 0.02, 3.0
    x, y = data(likelihood, 4, 3)
    damping = Damping(0.3, form, LevenbergMarquardt(every=1, decay=0.8), ratio=ratio)
    settings = FIXED | {"momentum": False, "periods": Periods(inverses=3, early=(1,))}
    opt = ng.KFAC(model, likelihood, damping=damping, l2=l2, **settings)
    lam, factors, kept = 0.3, None, 0.0
    for k in range(1, 8):
        before, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        opt.step(x, y)
        gamma = ratio * math.sqrt(lam + l2)
        assert opt.stats["gamma"] == pytest.approx(gamma, rel=1e-12)
        if k == 1 or k % 3 == 0:
            factors, kept = dense_factors(opt), gamma
        used = gamma if isinstance(form, ExactTikhonov) else kept
        direction = dense_proposal(opt, model, gradient, used**2, factors=factors)
        expected = dense_update(F, lam + l2, gradient, direction)
        torch.testing.assert_close(vector(model) - before, expected, rtol=1e-8, atol=1e-10)
        lam = opt.stats["lambda"]
    assert lam < 0.3


@pytest.mark.parametrize("value", [0.3, None])
def test_the_ratio_does_not_apply_where_a_rule_moves_gamma(value: float | None) -> None:
    likelihood = ng.Bernoulli()
    damping = Damping(value, rule=None, gamma=GreedyGamma(every=10), ratio=7.0)
    opt = ng.KFAC(mlp(4, 3, 3), likelihood, damping=damping, l2=0.02, guard=NO_UPDATE)
    opt.step(*data(likelihood, 4, 3))
    assert opt.stats["gamma"] == pytest.approx(math.sqrt(opt.stats["lambda"] + 0.02), rel=1e-12)


@pytest.mark.parametrize("quality", ["model", "loss"])
@pytest.mark.parametrize("momentum", [False, True])
def test_gamma_rule_takes_the_best_of_three(quality: str, momentum: bool) -> None:
    likelihood, model, lam, l2 = ng.Bernoulli(), mlp(5, 4, 3), 0.5, 0.02
    x, y = data(likelihood, 5, 3)
    rule = GreedyGamma(every=2, quality=quality)
    opt = ng.KFAC(model, likelihood, damping=Damping(lam, rule=None, gamma=rule), l2=l2, momentum=momentum, **FIXED)
    start = vector(model)
    opt.step(x, y)
    before, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
    previous = before - start if momentum else torch.zeros_like(before)
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt.step(x, y)
    gamma0, omega = math.sqrt(lam + l2), math.sqrt(0.95) ** 2
    values, updates = {}, {}
    for gamma in (gamma0, gamma0 * omega, gamma0 / omega):
        proposal = dense_proposal(opt, model, gradient, gamma**2)
        updates[gamma] = d = dense_update(F, lam + l2, gradient, proposal, previous)
        change = gradient @ d + 0.5 * d @ (F @ d + (lam + l2) * d)
        values[gamma] = change if quality == "model" else objective(moved(model, before + d), likelihood, x, y, l2)
    best = min(values, key=values.__getitem__)
    assert opt.stats["gamma"] == pytest.approx(best, rel=1e-9)
    torch.testing.assert_close(vector(model), before + updates[best], rtol=1e-8, atol=1e-10)


def test_paper_constants() -> None:
    opt = ng.KFAC.paper(mlp(3, 2), ng.Gaussian())
    assert (opt.damping.value, opt.l2, opt._running.decay) == (150.0, 1e-5, 0.95)
    assert opt.damping.rule == LevenbergMarquardt(every=5, decay=19 / 20, minimum=0.0)
    assert opt.damping.gamma == GreedyGamma(every=20, decay=19 / 20, quality="model", bounded=False, minimum=0.0)
    assert opt.damping.form == FactoredTikhonov("trace")
    assert not opt.coefficients.active
    assert (opt.subsets, opt.periods, opt.guard) == (Subsets(1 / 8, 1 / 4), Periods(20, (1, 2, 3), 1), None)
    assert opt.momentum and opt.param_groups[0]["lr"] == 1.0
    assert opt._gamma.item() == math.sqrt(150.0 + 1e-5)  # whatever the ratio of other settings
    assert [k for k in range(1, 61) if opt.periods.due(k)] == [1, 2, 3, 20, 40, 60]
    assert opt.subsets.rows(1000) == (125, 250) and opt.subsets.rows(1) == (1, 1)
    assert ng.KFAC.paper(mlp(3, 2), ng.Gaussian(), l2=0.0).l2 == 0.0


def test_paper_rules_act_when_and_as_published() -> None:
    """λ every 5 updates by (19/20)^5, γ every 20 by (19/20)^10, ε = min(1 − 1/k, 0.95) in the averages."""
    likelihood, model = ng.Bernoulli(), mlp(4, 3, 3)
    opt = ng.KFAC.paper(model, likelihood)
    lam, gamma, average = 150.0, math.sqrt(150.0 + 1e-5), torch.zeros(5, 5, dtype=torch.float64)
    for k in range(1, 42):
        x, y = data(likelihood, 4, 3, n=8, seed=k)
        opt.step(x[:1], y[:1])  # one example: τ₁ and τ₂ take it whole
        a = torch.cat([x[0], torch.ones(1, dtype=torch.float64)])
        epsilon = min(1 - 1 / k, 0.95)
        average = epsilon * average + (1 - epsilon) * torch.outer(a, a)
        torch.testing.assert_close(dense_factors(opt)["0"].A, average, rtol=1e-12, atol=1e-14)
        rho = opt.stats["rho"]
        if k % 5 == 0:
            lam *= 0.95**5 if rho > 0.75 else 0.95**-5 if rho < 0.25 else 1.0
        assert opt.stats["lambda"] == pytest.approx(lam, rel=1e-12)
        if k % 20 == 0:
            moves = [gamma, gamma * 0.95**10, gamma / 0.95**10]
            gamma = min(moves, key=lambda value: abs(value - opt.stats["gamma"]))
        assert opt.stats["gamma"] == pytest.approx(gamma, rel=1e-12)
    assert lam != 150.0 and gamma != math.sqrt(150.0 + 1e-5)


def test_the_factors_take_in_every_second_batch_once_they_are_not_young() -> None:
    likelihood, model = ng.Gaussian(), mlp(3, 2)
    x, y = data(likelihood, 3, 2)
    for statistics, expected in ((1, 27), (2, 20 + 3), (5, 20 + 1)):
        opt = ng.KFAC(model, likelihood, periods=Periods(statistics=statistics))
        for _ in range(27):
            opt.step(x, y)
        assert opt._running.updates == expected
    with pytest.raises(ValueError, match="statistics >= 1"):
        Periods(statistics=0)
