"""What K-FAC does not let happen: broken batches that poison it, and updates that raise the loss."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.kfac import EVERY_ROW, data, dense_factors, mlp, objective, vector
from torch import nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.optim.local_model import mean_nll
from natgrad.optim.settings import Damping, StepGuard, Subsets
from natgrad.quadratic import Subspace

LIKELIHOODS = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "categorical": ng.Categorical()}
by_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


@by_likelihood
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_batch_is_skipped_and_leaves_everything_as_it_was(name: str, bad: float) -> None:
    likelihood, model = LIKELIHOODS[name], mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    opt = ng.KFAC(model, likelihood)
    for _ in range(3):
        opt.step(x, y)
    parameters, factors, estimates = vector(model), dense_factors(opt), opt._running.updates.clone()
    lam, rejected = opt.stats["lambda"], opt.stats["rejected"]
    broken = x.clone()
    broken[0, 0] = bad
    for times in (1, 2, 3):  # the fifth update, at which inverses are due, is among them
        loss = opt.step(broken, y)
        assert math.isinf(bad) or math.isnan(loss.item())  # tanh(∞) is 1, but the gradient is not finite
        assert opt.stats["skipped"] == times and not opt.stats["accepted"] and opt.stats["step_norm"] == 0
        assert opt.stats["lambda"] == lam and opt.stats["rejected"] == rejected
        assert torch.equal(parameters, vector(model)) and torch.equal(opt._running.updates, estimates)
        for layer, block in dense_factors(opt).items():
            assert torch.equal(block.A, factors[layer].A) and torch.equal(block.G, factors[layer].G)
    for _ in range(5):
        opt.step(x, y)
    assert opt.stats["skipped"] == 3
    assert torch.isfinite(vector(model)).all() and not torch.equal(parameters, vector(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_targets_are_skipped(bad: float) -> None:
    model, (x, y) = mlp(5, 4, 3), data(ng.Gaussian(), 5, 3)
    opt = ng.KFAC(model, ng.Gaussian(), uncovered="identity")
    opt.step(x, y)
    before = vector(model)
    y[3, 1] = bad
    opt.step(x, y)
    assert opt.stats["skipped"] == 1 and torch.equal(before, vector(model))


def test_running_statistics_do_not_take_in_a_broken_batch() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = data(ng.Gaussian(), 5, 3)
    opt = ng.KFAC(model, ng.Gaussian())
    opt.step(x, y)
    before = [buffer.clone() for buffer in model.buffers()]
    x[0, 0] = math.nan
    opt.step(x, y)
    assert opt.stats["skipped"] == 1 and len(before) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@by_likelihood
@pytest.mark.parametrize("paper", [False, True])
def test_a_broken_first_batch_is_survived(name: str, paper: bool) -> None:
    likelihood, model = LIKELIHOODS[name], mlp(4, 3, 3)
    x, y = data(likelihood, 4, 3)
    opt = (ng.KFAC.paper if paper else ng.KFAC)(model, likelihood)
    opt.step(x * math.nan, y)
    first = likelihood.nll(model(x), y).item()
    losses = [opt.step(x, y).item() for _ in range(30)]
    assert opt.stats["skipped"] == 1 and losses[0] == pytest.approx(first, rel=1e-12)
    assert losses[-1] < first and torch.isfinite(vector(model)).all()


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_a_rejected_update_keeps_the_parameters_forgets_the_last_one_and_raises_the_damping(l2: float) -> None:
    likelihood, model = ng.Bernoulli(), mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    opt = ng.KFAC(model, likelihood, damping=0.2, l2=l2)
    for _ in range(3):
        opt.step(x, y)
    assert opt.stats["accepted"] and opt.stats["mu"] != 0 and opt._previous.any()
    before, lam, usual = vector(model), opt.stats["lambda"], opt.guard
    for times in (1, 2):
        opt.guard = StepGuard(threshold=1e6, raise_damping=2.5)
        opt.step(x, y)
        lam *= 2.5
        assert torch.equal(before, vector(model)) and not opt._previous.any()
        assert opt.stats["rejected"] == times and not opt.stats["accepted"] and opt.stats["skipped"] == 0
        assert opt.stats["lambda"] == pytest.approx(lam, rel=1e-12) and opt.stats["step_norm"] == 0
        assert opt.stats["rho"] < 1e6 and opt.stats["alpha"] != 0  # what was tried is still reported
    opt.guard = usual
    opt.step(x, y)
    assert opt.stats["mu"] == 0 and opt.stats["accepted"] and not torch.equal(before, vector(model))


def test_the_share_of_a_shortened_update_minimises_the_parabola_through_what_was_found() -> None:
    guard, coefficients = StepGuard(), torch.tensor([2.0, -1.0]).double()
    model = Subspace(torch.tensor([-3.0, 1.0]).double(), torch.eye(2).double())
    slope = -7.0  # along δ
    for actual in (0.0, 1.0, 3.5, 14.0):
        shares = torch.linspace(0.1, 0.5, 40001).double()
        curvature = 2 * (actual - slope)
        best = shares[torch.argmin(shares * slope + 0.5 * shares**2 * curvature)]
        found = guard.shorter(model, coefficients, torch.tensor(actual).double())
        assert found == pytest.approx(best.item(), abs=2e-5)
    assert guard.shorter(model, coefficients, torch.tensor(3.5).double()) == pytest.approx(1 / 3)
    for broken in (math.inf, math.nan, 1e9):
        assert guard.shorter(model, coefficients, torch.tensor(broken).double()) == pytest.approx(0.1)


@pytest.mark.parametrize("second", [-0.01, 0.5])
def test_an_update_that_fails_is_tried_once_more_shorter(second: float) -> None:
    """The first try raises the loss by as much as its slope promised to lower it: the parabola's minimum is at ¼."""
    likelihood, model = ng.Gaussian(), mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    damping = Damping(0.3, rule=None)
    opt, twin = (
        ng.KFAC(m, likelihood, damping=damping, subsets=EVERY_ROW, guard=guard)
        for m, guard in ((model, StepGuard(raise_shortened=1.5)), (copy.deepcopy(model), None))
    )
    before, h = vector(model), likelihood.nll(model(x), y).detach()
    twin.step(x, y)  # makes the update whole
    delta = vector(twin.view.module) - before
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(likelihood.nll(model(x), y), model.parameters())])
    slope = (gradient @ delta).item()
    tried = []

    def losses(tapes: Any, held_out: Any) -> list[torch.Tensor]:
        tried.append(vector(model) - before)
        return [h - slope if len(tried) == 1 else h + second, torch.zeros(())]

    opt.local.losses = losses
    opt.step(x, y)
    assert slope < 0 and len(tried) == 2
    torch.testing.assert_close(tried[0], delta, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tried[1], delta / 4, rtol=1e-9, atol=1e-12)
    accepted = second < 0
    torch.testing.assert_close(vector(model) - before, delta / 4 * accepted, rtol=1e-9, atol=1e-12)
    assert opt.stats["shortened"] == accepted and opt.stats["rejected"] == (not accepted)
    assert bool(opt.stats["accepted"]) is accepted
    assert opt.stats["step_norm"] == pytest.approx(delta.norm().item() / 4 * accepted)
    previous = torch.cat([opt.layout.parameters(opt._previous)[name].flatten() for name in opt.view.names])
    torch.testing.assert_close(previous, delta / 4 * accepted, rtol=1e-9, atol=1e-12)
    # δ is M's minimum along Δ, so its curvature is −slope where h's would have been −4 slope
    lam = 0.3 * 1.5 if accepted else max(0.3 - 3 * slope / delta.norm().item() ** 2, 0.3 * 4)
    assert opt.stats["lambda"] == pytest.approx(lam, rel=1e-6)


def test_an_update_that_overflows_is_rejected_even_without_a_guard() -> None:
    """h(θ + δ) is not finite: nothing that follows could be."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).double()
    for p in model.parameters():
        nn.init.constant_(p, 1e-3)
    x, y = torch.full((4, 1), 1e-3, dtype=torch.float64), torch.full((4, 1), 1e150, dtype=torch.float64)
    opt = ng.KFAC(model, ng.Gaussian(), damping=Damping(1e-8, rule=None), guard=None, subsets=EVERY_ROW)
    before = vector(model)
    opt.step(x, y)
    assert torch.isfinite(vector(model)).all()
    assert opt.stats["accepted"] != torch.equal(before, vector(model))


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    return {
        "widths": draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)),
        "biases": draw(st.lists(st.booleans(), min_size=3, max_size=3)),
        "leading": draw(st.sampled_from([(), (), (2,), (3, 2)])),
        "n": draw(st.sampled_from([1, 2, 7])),
        "likelihood": draw(st.sampled_from(list(LIKELIHOODS.values()))),
        "activation": draw(st.sampled_from([nn.Tanh, nn.Sigmoid, nn.ReLU])),
        "form": draw(st.sampled_from([ExactTikhonov(), FactoredTikhonov()])),
        "l2": draw(st.sampled_from([0.0, 0.01])),
        "damping": draw(st.sampled_from([None, 1e-3, 10.0])),
        "seed": draw(st.integers(0, 100)),
    }


@given(problems())
def test_no_update_raises_the_loss_of_its_batch(problem: dict[str, Any]) -> None:
    widths, n, likelihood, l2 = problem["widths"], problem["n"], problem["likelihood"], problem["l2"]
    torch.manual_seed(problem["seed"])
    layers: list[nn.Module] = []
    for d_in, d_out, bias in zip(widths[:-1], widths[1:], problem["biases"], strict=False):
        layers += [problem["activation"](), nn.Linear(d_in, d_out, bias=bias)]
    model = nn.Sequential(*layers[1:]).double()
    generator = torch.Generator().manual_seed(problem["seed"])
    x = torch.randn(n, *problem["leading"], widths[0], generator=generator, dtype=torch.float64)
    y = likelihood.sample(torch.randn(*x.shape[:-1], widths[-1], generator=generator, dtype=x.dtype), generator)
    opt = ng.KFAC(model, likelihood, damping=Damping(problem["damping"], problem["form"]), l2=l2)
    before = objective(model, likelihood, x, y, l2)
    for _ in range(4):
        loss = opt.step(x, y)
        after = objective(model, likelihood, x, y, l2)
        assert torch.isfinite(loss) and torch.isfinite(vector(model)).all()
        assert after <= before + 1e-12 * max(1.0, abs(before))
        before = after
    assert opt.stats["skipped"] == 0 and opt.stats["updates"] == 4


def test_lambda_rises_to_the_curvature_that_was_observed() -> None:
    """h(θ+δ) − h(θ) = s + ½ c along δ, where M has δᵀ C δ in the place of c: λ ‖δ‖² makes up the difference."""
    model = Subspace(torch.tensor([-3.0, 1.0]).double(), torch.tensor([[2.0, 0.5], [0.5, 4.0]]).double())
    coefficients, lam, norm = torch.tensor([1.5, -0.5]).double(), torch.tensor(0.1).double(), torch.tensor(2.0).double()
    slope, curvature = model.slope @ coefficients, coefficients @ model.curvature @ coefficients
    assert (slope, curvature) == (pytest.approx(-5.0), pytest.approx(4.75))
    guard = StepGuard(raise_damping=1.5)
    change = slope + 0.5 * 12.0
    found = guard.raised(lam, model, coefficients, change, torch.tensor(7.0).double(), norm)
    assert found == pytest.approx(0.1 + (12.0 - 4.75) / 4)
    # rounding, an overflow, and a curvature below M's: only what raise_damping says
    for actual, before in ((change, 1e7), (torch.tensor(math.inf).double(), 7.0), (slope + 0.5 * 4.0, 7.0)):
        found = guard.raised(lam, model, coefficients, actual, torch.tensor(before).double(), norm)
        assert found == pytest.approx(0.15)


def test_an_update_that_suits_the_curvature_rows_alone_is_rejected() -> None:
    likelihood, model = ng.Gaussian(), mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3, n=40)
    opt = ng.KFAC(model, likelihood, subsets=Subsets(1 / 4, 1 / 4), guard=StepGuard(tolerance=0.02))
    opt.step(x, y)
    true_losses, before, lam = opt.local.losses, vector(model), opt.stats["lambda"]
    for share, accepted in ((0.03, False), (0.01, True)):

        def losses(tapes: Any, held_out: Any, share: float = share) -> list[torch.Tensor]:
            assert sum(len(rows.inputs) for rows in held_out) == 10
            as_it_was = mean_nll(held_out, [rows.nll for rows in held_out])
            return [true_losses(tapes, held_out)[0], as_it_was * (1 + share)]

        opt.local.losses = losses
        opt.step(x, y)
        assert bool(opt.stats["accepted"]) is accepted and torch.equal(before, vector(model)) is not accepted
        assert accepted or opt.stats["lambda"] >= 1.5 * lam


@pytest.mark.parametrize("chain", [True, False])
def test_rows_held_out_are_others_than_the_curvature_rows(chain: bool) -> None:
    model = mlp(5, 4, 3)
    model = model if chain else nn.Sequential(model, nn.Dropout(0.0))
    x, y = data(ng.Gaussian(), 5, 3, n=40)
    for share, expected in ((1 / 4, 10), (3 / 4, 10), (1.0, 0)):
        opt = ng.KFAC(model, ng.Gaussian(), subsets=Subsets(share, share))
        found = opt._evaluator([(x, y)], opt.subsets, opt._generator, held_out=True)
        used = torch.cat([tape.inputs for tape in found.tapes])
        held = torch.cat([rows.inputs for rows in found.held_out]) if found.held_out else x[:0]
        assert (len(used), len(held)) == (int(40 * share), expected)
        assert len(torch.unique(torch.cat([used, held]), dim=0)) == len(used) + len(held)
        for rows in found.held_out:
            assert rows.nll == pytest.approx(ng.Gaussian().nll(model(rows.inputs), rows.targets, count=1).item())
        assert found.loss == pytest.approx(ng.Gaussian().nll(model(x), y).item())


def test_more_rows_while_the_averages_are_young() -> None:
    subsets = Subsets(1 / 16, 1 / 8, minimum=64, early=256)
    assert [subsets.at(k).rows(1000) for k in (1, 20, 21)] == [(256, 256), (256, 256), (64, 125)]
    assert subsets.at(1).rows(100) == (100, 100) and Subsets().at(1) == Subsets()
