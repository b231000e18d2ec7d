"""K-FAC's update against a dense reconstruction of every step, in float64."""

import math
from typing import Any

import pytest
import torch
from oracles.kfac import EVERY_ROW, FIXED, data, dense_proposal, gradient_of, mlp, vector
from torch import nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.settings import Damping, Periods, Subsets

LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_three_updates_equal_the_dense_reconstruction(likelihood: Any, form: Any, l2: float) -> None:
    model = mlp(4, 3, 3)
    x, y = data(likelihood, 4, 3)
    damping = Damping(0.3, form, LevenbergMarquardt(every=1, decay=0.9), ratio=1.5)
    opt = ng.KFAC(model, likelihood, damping=damping, l2=l2, **FIXED)
    previous, lam = torch.zeros_like(vector(model)), 0.3
    for _ in range(3):
        before = vector(model)
        gradient = gradient_of(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        h_before = likelihood.nll(model(x), y).item() + 0.5 * l2 * before.square().sum().item()
        loss = opt.step(x, y)
        assert loss.item() == pytest.approx(h_before - 0.5 * l2 * before.square().sum().item(), rel=1e-12)
        delta = vector(model) - before
        proposal = dense_proposal(opt, model, gradient, 2.25 * (lam + l2))
        H = F + (lam + l2) * torch.eye(len(F), dtype=torch.float64)
        D = torch.stack([proposal, previous], 1) if previous.any() else proposal[:, None]
        c = torch.linalg.solve(D.T @ H @ D, -D.T @ gradient)
        torch.testing.assert_close(delta, D @ c, rtol=1e-8, atol=1e-10)
        change = (gradient @ delta + 0.5 * delta @ H @ delta).item()
        assert change == pytest.approx(0.5 * (gradient @ delta).item(), rel=1e-9)  # M(δ) − M(0) = ½ ∇h·δ
        h_after = likelihood.nll(model(x), y).item() + 0.5 * l2 * vector(model).square().sum().item()
        rho = (h_after - h_before) / change
        assert opt.stats["rho"] == pytest.approx(rho, rel=1e-6)
        lam = lam * 0.9 if rho > 0.75 else lam / 0.9 if rho < 0.25 else lam
        assert opt.stats["lambda"] == pytest.approx(lam, rel=1e-12)
        previous = delta


def test_one_undamped_step_on_one_layer_is_newtons() -> None:
    model = mlp(4, 2)
    likelihood = ng.Gaussian()
    x, y = data(likelihood, 4, 2)
    start, gradient = vector(model), gradient_of(model, likelihood, x, y, 0.0)
    H = ng.Hessian(model, likelihood, x, y).to_dense()
    opt = ng.KFAC(model, likelihood, damping=Damping(0.0, rule=None), **FIXED)
    opt.step(x, y)
    torch.testing.assert_close(vector(model), start - torch.linalg.solve(H, gradient), rtol=1e-9, atol=1e-10)
    assert opt.stats["alpha"] == pytest.approx(1.0, rel=1e-9)
    assert opt.stats["rho"] == pytest.approx(1.0, rel=1e-9)


def test_on_a_quadratic_momentum_is_preconditioned_conjugate_gradients() -> None:
    """[KFAC, sec. 7]: λ = 0 (η in h), γ fixed, and a fixed quadratic: the squared error of one linear layer."""
    likelihood, l2, gamma2 = ng.Gaussian(), 0.1, 3.0
    model = mlp(5, 3)
    x, y = data(likelihood, 5, 3, n=20)
    H = ng.Hessian(model, likelihood, x, y).to_dense() + l2 * torch.eye(18, dtype=torch.float64)
    theta, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
    # a preconditioner that is not the inverse of H: damped with a γ² that is not η
    settings = {"subsets": EVERY_ROW, "guard": None, "periods": Periods(inverses=10**6, early=(1,))}
    damping = Damping(0.0, ExactTikhonov(), None, GreedyGamma(every=10**6))
    opt = ng.KFAC(model, likelihood, damping=damping, l2=l2, **settings)
    opt._gamma = torch.tensor(math.sqrt(gamma2), dtype=torch.float64)
    residual, direction, last = -gradient, None, None
    for _ in range(6):
        opt.step(x, y)
        preconditioned = -dense_proposal(opt, model, residual, gamma2)
        rz = residual @ preconditioned
        direction = preconditioned if direction is None else preconditioned + rz / last * direction
        alpha = rz / (direction @ H @ direction)
        theta, residual, last = theta + alpha * direction, residual - alpha * H @ direction, rz
        torch.testing.assert_close(vector(model), theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_low_rank_form_gives_the_same_update(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = ng.Bernoulli()
    x, y = data(likelihood, 9, 8, n=3)
    results = []
    for pays in (True, False):
        model = mlp(9, 7, 8)
        monkeypatch.setattr("natgrad.optim.proposal.low_rank_pays", lambda *shape, pays=pays: pays)
        opt = ng.KFAC(model, likelihood, damping=Damping(0.5, FactoredTikhonov(), ratio=1.0), l2=l2, **FIXED)
        opt.step(x, y)
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_fast_and_general_tangents_give_the_same_update() -> None:
    likelihood = ng.Categorical()
    x, y = data(likelihood, 4, 3)
    results = []
    for forward in (None, lambda model, inputs: model(inputs)):
        model = mlp(4, 5, 3, activation=nn.Sigmoid)
        opt = ng.KFAC(model, likelihood, damping=1.0, forward=forward, subsets=Subsets(0.3, 0.5))
        assert (opt.local.chain is None) == (forward is not None)
        for _ in range(3):
            opt.step(x, y)
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["size", "iterable"])
def test_micro_batches_give_the_same_update(kind: str) -> None:
    likelihood = ng.Gaussian(normalizer="element")
    x, y = data(likelihood, 6, 4, n=10)
    whole, split = mlp(6, 4), mlp(6, 4)  # one layer with a known G: nothing is sampled
    for model, arguments in (
        (whole, (x, y)),
        (split, (x, y, 3) if kind == "size" else ([(x[:4], y[:4]), (x[4:], y[4:])],)),
    ):
        opt = ng.KFAC(model, likelihood, damping=1.0, subsets=EVERY_ROW)
        loss = opt.step(*arguments)
        assert loss.item() == pytest.approx(likelihood.nll(mlp(6, 4)(x), y).item(), rel=1e-12)
    torch.testing.assert_close(vector(whole), vector(split), rtol=1e-10, atol=1e-12)


def test_learning_rate_multiplies_the_step() -> None:
    likelihood = ng.Gaussian()
    x, y = data(likelihood, 4, 2)
    deltas = []
    for lr in (1.0, 0.25):
        model = mlp(4, 3, 2)
        start = vector(model)
        opt = ng.KFAC(model, likelihood, damping=1.0)
        opt.param_groups[0]["lr"] = lr
        opt.step(x, y)
        deltas.append(vector(model) - start)
    torch.testing.assert_close(deltas[1], 0.25 * deltas[0], rtol=1e-10, atol=1e-14)
