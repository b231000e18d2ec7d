"""How K-FAC finds and moves λ and γ, and the published constants."""

import math

import pytest
import torch
from oracles.kfac import EVERY_ROW, data, dense_proposal, gradient_of, mlp

import natgrad as ng
from natgrad.damping import FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.settings import Damping, Periods, Subsets


def test_gamma_rule_takes_the_best_of_three() -> None:
    likelihood = ng.Bernoulli()
    model = mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    settings = {"subsets": EVERY_ROW, "guard": None, "momentum": False, "periods": Periods(inverses=1)}
    opt = ng.KFAC(model, likelihood, damping=Damping(0.5, FactoredTikhonov(), None, GreedyGamma(every=2)), **settings)
    opt.step(x, y)
    gradient, F = gradient_of(model, likelihood, x, y, 0.0), ng.Fisher(model, likelihood, x).to_dense()
    H = F + 0.5 * torch.eye(len(F), dtype=torch.float64)
    opt.step(x, y)
    gamma0, omega = math.sqrt(0.5), math.sqrt(0.95) ** 2
    quality = {}
    for gamma in (gamma0, gamma0 * omega, gamma0 / omega):
        d = dense_proposal(opt, model, gradient, gamma**2)
        quality[gamma] = -0.5 * (gradient @ d).item() ** 2 / (d @ H @ d).item()
    assert opt.stats["gamma"] == pytest.approx(min(quality, key=quality.__getitem__), rel=1e-9)


def test_paper_constants() -> None:
    opt = ng.KFAC.paper(mlp(3, 2), ng.Gaussian())
    assert (opt.damping.value, opt.l2, opt._running.decay) == (150.0, 1e-5, 0.95)
    assert opt.damping.rule == LevenbergMarquardt(every=5, decay=19 / 20, minimum=0.0)
    assert opt.damping.gamma == GreedyGamma(every=20, decay=19 / 20, quality="model", bounded=False)
    assert opt.damping.form == FactoredTikhonov("trace")
    assert (opt.subsets, opt.periods, opt.guard) == (Subsets(1 / 8, 1 / 4), Periods(20, (1, 2, 3)), None)
