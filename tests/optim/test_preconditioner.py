"""Preconditioned gradients against dense inverses in float64."""

import math
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, damped_solve, exact, fisher, gradient, mlp, plain, targets, train_once
from torch import nn

import natgrad as ng
from natgrad.damping import FactoredTikhonov
from natgrad.optim.settings import Periods

LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
def test_exact_damping_equals_the_dense_inverse(likelihood: Any) -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    torch.testing.assert_close(train_once(model, pre, likelihood, x, y), damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    pre.damping = 0.3  # no new decomposition is needed
    model.zero_grad()
    likelihood.nll(model(x), y).backward()
    pre.precondition()
    torch.testing.assert_close(gradient(model), damped_solve(F, 0.3, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pi", ["trace", "frobenius", "one"])
def test_factored_damping_equals_the_dense_inverse(pi: str) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    g, factors = plain(model, likelihood, x, y), fisher(model, likelihood, x).factors
    found = train_once(model, exact(model, likelihood, form=FactoredTikhonov(pi=pi)), likelihood, x, y)
    expected, offset, root = [], 0, math.sqrt(0.1)
    for name, (o, i) in {"0": (3, 4), "2": (3, 3)}.items():
        A, G = factors[name].A.to_dense(), factors[name].G.to_dense()
        norm = {"trace": lambda M: M.trace() / len(M), "frobenius": lambda M: M.norm() / len(M) ** 0.5}
        ratio = 1.0 if pi == "one" else math.sqrt(norm[pi](A) / norm[pi](G))
        eye_a, eye_g = torch.eye(i + 1, dtype=g.dtype), torch.eye(o, dtype=g.dtype)
        block = torch.kron(A + ratio * root * eye_a, G + root / ratio * eye_g)
        W, b = g[offset : offset + o * i].view(o, i), g[offset + o * i : offset + o * (i + 1)]
        U = torch.linalg.solve(block, torch.cat([W, b[:, None]], 1).T.reshape(-1)).view(i + 1, o).T
        expected += [U[:, :i].reshape(-1), U[:, i]]
        offset += o * (i + 1)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-12)


def test_averages_decay_and_periods_are_kept() -> None:
    likelihood = ng.Bernoulli()
    model, y = mlp(4, 3, 3), targets(likelihood)
    pre = exact(model, likelihood, periods=ng.Renewal(inverses=3, early=(1,), statistics=2), decay=0.3)
    A = {k: fisher(model, likelihood, batch(seed=k)).factors["0"].A for k in (1, 2, 4, 6)}
    for k in range(1, 7):
        train_once(model, pre, likelihood, batch(seed=k), y)
    average = 0.3 * A[1] + 0.7 * A[2]  # ε = min(1 − 1/k, 0.3): 0, then 0.3
    average = 0.3 * average + 0.7 * A[4]  # step 3 is not due, nor is 5
    average = 0.3 * average + 0.7 * A[6]
    torch.testing.assert_close(pre._running.factors["0"].A, average, rtol=1e-12, atol=0)
    basis = pre._inverses._kept["0"]
    torch.testing.assert_close(basis.QA @ torch.diag(basis.a) @ basis.QA.T, average, rtol=1e-9, atol=1e-12)
    model.zero_grad()  # the inverses are those of step 6 until step 9
    z = model(batch(seed=7))
    assert not pre.due
    pre.observe(z)
    likelihood.nll(z, y).backward()
    pre.step()
    assert pre._inverses._kept["0"] is basis and pre.stats["steps"] == 7
    plain_periods = exact(model, likelihood, periods=Periods(inverses=2))
    train_once(model, plain_periods, likelihood, batch(), y)
    assert plain_periods.due  # statistics at every step


def test_kl_clip_bounds_the_step() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    U = train_once(model, exact(model, likelihood), likelihood, x, y)
    g = plain(model, likelihood, x, y)
    for radius in (1e-3, 1e3):
        pre = exact(model, likelihood, scaling=ng.KLClip(radius))
        nu = min(1.0, math.sqrt(2 * radius / (g @ U).item()))
        torch.testing.assert_close(train_once(model, pre, likelihood, x, y), nu * U, rtol=1e-10, atol=0)
        assert pre.stats["nu"] == pytest.approx(nu, rel=1e-12)
        step, F = nu * U, fisher(model, likelihood, x).to_dense()
        assert 0.5 * step @ F @ step <= radius
    assert nu == 1.0


def test_sampled_statistics_are_those_of_the_same_draws() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood, expectation="sampled", seed=7)
    generator = torch.Generator().manual_seed(7)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x, expectation="sampled", generator=generator)
    found = train_once(model, pre, likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F.to_dense(), 0.1, g), rtol=1e-9, atol=1e-12)


def test_observe_leaves_loss_gradients_and_global_random_numbers_alone() -> None:
    likelihood = ng.Categorical()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = batch(), targets(likelihood)
    results = []
    for observed in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        pre = ng.Preconditioner(model, likelihood)
        z = model(x)
        if observed:
            pre.observe(z)
            assert all(p.grad is None for p in model.parameters())
        likelihood.nll(z, y).backward()
        results.append((gradient(model), torch.rand(3)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    state = torch.get_rng_state()
    pre.update(x)
    assert torch.equal(state, torch.get_rng_state())


def test_update_equals_observe() -> None:
    likelihood = ng.Categorical()
    results = []
    for eager in (False, True):
        model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
        pre = ng.Preconditioner(model, likelihood, seed=5)
        z = model(x)
        pre.update(x) if eager else pre.observe(z)
        likelihood.nll(z, y).backward()
        pre.step()
        results.append(gradient(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("normalizer", ["example", "element", "none"])
@pytest.mark.parametrize("how", ["observe", "update"])
def test_micro_batches_equal_one_batch(normalizer: str, how: str) -> None:
    likelihood = ng.Bernoulli(normalizer=normalizer)
    results = []
    for sizes in ([12], [5, 4, 3]):
        model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
        pre = exact(model, likelihood)
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            z = model(xs)
            pre.observe(z) if how == "observe" else pre.update(xs)
            (likelihood.nll(z, ys) * (1 if normalizer == "none" else len(xs) / 12)).backward()
        pre.step()
        results.append(gradient(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_outputs_observed_after_all_forward_passes() -> None:
    likelihood = ng.Bernoulli()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model.zero_grad()
    pre = exact(model, likelihood)
    zs = [model(part) for part in x.split(6)]
    for z in reversed(zs):
        pre.observe(z)
    likelihood.nll(torch.cat(zs), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    model.zero_grad()
    pre = exact(model, likelihood)
    z = torch.cat([model(part) for part in x.split(6)])
    pre.observe(z)
    likelihood.nll(z, y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)


def test_targets_and_weights_of_the_loss() -> None:
    likelihood = ng.Categorical(class_weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    z = model(x)
    with pytest.raises(ValueError, match="depends on the targets.*y="):
        pre.observe(z)
    pre.observe(z, y)
    likelihood.nll(z, y).backward()
    pre.step()
    F = fisher(model, likelihood, x, y=y).to_dense()
    torch.testing.assert_close(
        gradient(model), damped_solve(F, 0.1, plain(model, likelihood, x, y)), rtol=1e-9, atol=1e-12
    )
    weight = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gaussian = ng.Gaussian()
    pre, y = exact(model, gaussian), targets(gaussian)
    model.zero_grad()
    z = model(x)
    pre.observe(z, weight=weight)
    loss = gaussian.nll(z, y, weight=weight)
    loss.backward()
    g = gradient(model)
    pre.step()
    F = fisher(model, gaussian, x, weight=weight).to_dense()
    torch.testing.assert_close(gradient(model), damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
