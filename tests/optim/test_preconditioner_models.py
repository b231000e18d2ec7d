"""A preconditioner on all kinds of models, dtypes and batches, and what it says to bad calls."""

import math
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, damped_solve, exact, fisher, gradient, mlp, plain, targets, train_once
from torch import Tensor, nn

import natgrad as ng


def test_frozen_parameters() -> None:
    likelihood = ng.Gaussian()
    model, x, y = mlp(4, 3, 5, 3), batch(), targets(likelihood)
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    pre = exact(model, likelihood)
    found = train_once(model, pre, likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert model[0].weight.grad is None and model[2].weight.grad is None and model[4].bias.grad is None
    model[0].requires_grad_(True)  # not covered: left alone
    model.zero_grad()
    z = model(x)
    pre.observe(z)
    likelihood.nll(z, y).backward()
    before = model[0].weight.grad.clone()
    pre.step()
    assert torch.equal(model[0].weight.grad, before)
    model[2].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="layer '2': requires_grad.*make a new"):
        pre.observe(model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("how", ["observe", "update"])
def test_a_tied_weight_is_one_block_and_its_biases_are_diagonal(how: str) -> None:
    likelihood = ng.Gaussian()
    torch.manual_seed(0)
    model, x, y = Tied().double(), batch(), targets(likelihood)
    F = fisher(model, likelihood, x).to_dense()
    g = plain(model, likelihood, x, y)
    pre = exact(model, likelihood)
    pre.update(x) if how == "update" else None
    model.zero_grad()
    z = model(x)
    pre.observe(z) if how == "observe" else None
    likelihood.nll(z, y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert pre.stats["bare"] == 0 and not pre.coverage().uncovered


def test_a_weight_tied_in_another_way_is_named_or_left_alone() -> None:
    likelihood = ng.Categorical()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    model[2].weight = model[0].weight
    ids, y = torch.arange(12) % 5, torch.arange(12) % 3
    with pytest.raises(ValueError, match=r"covers 0\.weight \(Embedding, shared with another module\); freeze"):
        ng.Preconditioner(model, likelihood)
    pre = exact(model, likelihood, uncovered="identity")
    assert list(pre.coverage().layers) == ["2.bias"] and pre.coverage().uncovered == ("0.weight",)
    g = plain(model, likelihood, ids, y)
    torch.testing.assert_close(train_once(model, pre, likelihood, ids, y)[:20], g[:20])


def test_layers_that_are_unused_or_used_twice() -> None:
    likelihood = ng.Gaussian()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model, x, y = Twice().double(), batch(d=3), targets(likelihood)
    F = fisher(model, likelihood, x).to_dense()[:12, :12]
    pre = exact(model, likelihood)
    z = model(x)
    pre.observe(z)
    likelihood.nll(z, y).backward()
    g = torch.cat([model.a.weight.grad.reshape(-1), model.a.bias.grad])
    pre.step()
    found = torch.cat([model.a.weight.grad.reshape(-1), model.a.bias.grad])
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert model.idle.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 12])
def test_dtypes_and_a_batch_of_one(dtype: torch.dtype, n: int) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(n), targets(likelihood, n)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model = model.to(dtype)
    pre = exact(model, likelihood)
    found = train_once(model, pre, likelihood, x.to(dtype), y)
    assert found.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert pre.state_dict()["layers"]["0"]["A"].dtype == wide
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_autocast() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3).float(), batch(dtype=torch.float32), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model.zero_grad()
    pre = exact(model, likelihood)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(x)
        assert z.dtype == torch.bfloat16
        loss = likelihood.nll(z.float(), y)
        pre.observe(z)
    loss.backward()
    pre.step()
    assert (gradient(model) - expected).norm() < 0.03 * expected.norm()


def test_nan_batches_are_skipped_and_counted() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    bad = x.clone()
    bad[3, 2] = math.nan
    pre = exact(model, likelihood)
    model.zero_grad()
    pre.observe(model(bad))
    likelihood.nll(model(x), y).backward()
    before = gradient(model)
    pre.step()  # no statistics yet: the gradient is left as it is
    assert torch.equal(gradient(model), before)
    assert pre.stats["skipped"] == 1 and pre.stats["bare"] == 2
    good = train_once(model, pre, likelihood, x, y)
    F, g = fisher(model, likelihood, x).to_dense(), plain(model, likelihood, x, y)
    torch.testing.assert_close(good, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert pre.stats["bare"] == 0
    model.zero_grad()
    pre.update(x)
    pre.observe(model(bad))  # one bad micro-batch spoils the estimate of the step, not the average
    likelihood.nll(model(x), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), good, rtol=1e-9, atol=1e-12)
    assert pre.stats["skipped"] == 2 and pre.stats["failed_inverses"] == 0


def test_a_failed_factorisation_keeps_the_previous_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    first = train_once(model, pre, likelihood, x, y)

    def fails(M: Tensor, **settings: Any) -> Any:
        return torch.full_like(M[0], math.nan), torch.full_like(M, math.nan), torch.tensor(False)

    monkeypatch.setattr("natgrad.curvature.inverse.safe_eigh", fails)
    model.zero_grad()
    pre.update(batch(seed=9))
    likelihood.nll(model(x), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), first, rtol=1e-12, atol=0)
    assert pre.stats["failed_inverses"] == 2


def test_batch_norm_and_dropout() -> None:
    likelihood = ng.Categorical()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    x, y = batch(), targets(likelihood)
    pre = exact(model, likelihood)
    torch.manual_seed(1)
    F = fisher(model, likelihood, x).factors  # with the masks of the same random state
    train_once(model, pre, likelihood, x, y)
    for name in ("0", "4"):
        torch.testing.assert_close(pre._running.factors[name].G, F[name].G, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pre._running.factors[name].A, F[name].A, rtol=1e-9, atol=1e-12)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    pre.update(x)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_sequences_and_forward() -> None:
    likelihood = ng.Categorical()
    model, x = mlp(4, 5, 3), batch(24).view(6, 4, 4)
    y = targets(likelihood, 24).view(6, 4)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    found = train_once(model, exact(model, likelihood), likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    pre = exact(model, likelihood, forward=lambda module, inputs: module(inputs["x"]))
    pre.update({"x": x})
    pre.precondition()
    model.zero_grad()
    likelihood.nll(model(x), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), found)


def test_bad_calls_are_explained() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    for settings in ({"structure": "full"}, {"damping": 0.0}, {"damping": -1.0}, {"decay": 1.0}, {"expectation": "no"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ng.Preconditioner(model, likelihood, **settings)
    with pytest.raises(ValueError, match="radius"):
        ng.KLClip(0.0)
    with pytest.raises(ValueError, match="statistics"):
        ng.Renewal(statistics=0)
    with pytest.raises(ValueError, match="no trainable layer"):
        ng.Preconditioner(nn.Bilinear(1, 1, 1), likelihood, uncovered="identity")
    pre = ng.Preconditioner(model, likelihood)
    with pytest.raises(RuntimeError, match=r"observe\(z\).*update\(inputs\)"):
        pre.step()
    with pytest.raises(TypeError, match="z: expected"):
        pre.observe((model(x),))
    with pytest.raises(ValueError, match="no graph"):
        pre.observe(model(x).detach())
    z = model(x)
    likelihood.nll(z, y).backward()
    with pytest.raises(RuntimeError, match="before loss.backward"):
        pre.observe(z)
    with pytest.raises(ValueError, match="empirical.*y="):
        ng.Preconditioner(model, likelihood, expectation="empirical").observe(model(x))
    with pytest.raises(ValueError, match="empty"):
        pre.update(x[:0])
    with pytest.raises(ValueError, match="targets"):
        pre.observe(model(x), y + 5)
