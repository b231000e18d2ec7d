"""What K-FAC does not let happen: broken batches and updates that raise the loss."""

import math

import pytest
import torch
from oracles.kfac import data, mlp, vector

import natgrad as ng
from natgrad.optim.settings import StepGuard


def test_a_nan_batch_is_skipped_and_leaves_everything_as_it_was() -> None:
    likelihood = ng.Bernoulli()
    model = mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    opt = ng.KFAC(model, likelihood)
    for _ in range(3):
        opt.step(x, y)
    parameters = vector(model)
    factors = {name: (f.A.to_dense().clone(), f.G.to_dense().clone()) for name, f in opt._running.factors.items()}
    lam = opt.stats["lambda"]
    bad = x.clone()
    bad[0, 0] = math.nan
    loss = opt.step(bad, y)
    assert math.isnan(loss.item())
    assert opt.stats["skipped"] == 1 and opt.stats["lambda"] == lam
    assert torch.equal(parameters, vector(model))
    for name, (A, G) in factors.items():
        assert torch.equal(A, opt._running.factors[name].A.to_dense())
        assert torch.equal(G, opt._running.factors[name].G.to_dense())
    for _ in range(5):
        opt.step(x, y)
    assert opt.stats["skipped"] == 1
    assert torch.isfinite(vector(model)).all() and not torch.equal(parameters, vector(model))


def test_a_nan_batch_as_the_first_one_is_survived() -> None:
    likelihood = ng.Gaussian()
    model = mlp(3, 3, 2)
    x, y = data(likelihood, 3, 2)
    opt = ng.KFAC(model, likelihood)
    opt.step(x * math.nan, y)
    first = likelihood.nll(model(x), y).item()
    for _ in range(20):
        opt.step(x, y)
    assert opt.stats["skipped"] == 1
    assert likelihood.nll(model(x), y).item() < 0.5 * first


def test_a_rejected_update_keeps_the_parameters_and_raises_the_damping() -> None:
    likelihood = ng.Bernoulli()
    model = mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    opt = ng.KFAC(model, likelihood, damping=0.2, guard=StepGuard(threshold=1e6, raise_damping=1.5))
    before = vector(model)
    opt.step(x, y)
    assert torch.equal(before, vector(model))
    assert opt.stats["rejected"] == 1 and not opt.stats["accepted"]
    assert opt.stats["lambda"] == pytest.approx(0.3) and opt.stats["step_norm"] == 0
