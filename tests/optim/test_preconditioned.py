"""Training with a preconditioner inside an ordinary optimiser: accuracy, schedulers, closures, scalers, checkpoints."""

import copy
import math
from typing import Any

import pytest
import torch
from oracles.classifier import LIKELIHOOD, blobs, mlp, train
from torch import Tensor, nn

import natgrad as ng

SGD = {"lr": 0.1, "momentum": 0.9}
ADAMW = {"lr": 1e-2}


def test_trains_faster_than_the_optimiser_alone() -> None:
    """At equal settings: within the first epoch than the inner optimiser, after two than plain SGD after four."""
    plain = None
    for kind, settings in ((torch.optim.SGD, SGD), (torch.optim.AdamW, ADAMW)):
        alone_model, model = mlp(20, 32, 8), mlp(20, 32, 8)
        alone = train(alone_model, kind(alone_model.parameters(), **settings), None, 4)
        plain = alone[-1] if plain is None else plain
        pre = ng.Preconditioner(model, LIKELIHOOD)
        found = train(model, ng.Preconditioned(kind(model.parameters(), **settings), pre), pre, 4)
        assert found[0] > alone[0] + 0.05
        assert found[1] > plain
        assert found[-1] > 0.975
        assert pre.stats["skipped"] == pre.stats["failed_inverses"] == pre.stats["bare"] == 0


def test_is_pre_step_and_inner_step() -> None:
    results = []
    for wrapped in (False, True):
        model = mlp(20, 32, 8)
        pre = ng.Preconditioner(model, LIKELIHOOD, seed=2)
        inner = torch.optim.SGD(model.parameters(), **SGD)

        class Both:
            def step(self, inner: Any = inner, pre: Any = pre) -> None:
                pre.step()
                inner.step()

            def zero_grad(self, inner: Any = inner) -> None:
                inner.zero_grad()

        train(model, ng.Preconditioned(inner, pre) if wrapped else Both(), pre, 1)
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*results)


def test_gradient_accumulation_trains_alike() -> None:
    found = []
    for parts in (1, 4):
        model = mlp(20, 32, 8, dtype=torch.float64)
        pre = ng.Preconditioner(model, LIKELIHOOD, expectation="exact")
        x, y = (t[:200] for t in blobs())
        optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), **SGD), pre)
        for _ in range(3):
            optimizer.zero_grad()
            for rows in torch.arange(200).chunk(parts):
                z = model(x[rows].double())
                pre.observe(z)
                (LIKELIHOOD.nll(z, y[rows]) / parts).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_lr_schedulers_act_on_either() -> None:
    results = []
    for on_inner in (True, False):
        model = mlp(20, 32, 8)
        pre = ng.Preconditioner(model, LIKELIHOOD)
        inner = torch.optim.SGD(model.parameters(), **SGD)
        optimizer = ng.Preconditioned(inner, pre)
        # Its first rate is 0: statistics and periods advance all the same.
        scheduler = torch.optim.lr_scheduler.LambdaLR(inner if on_inner else optimizer, lambda k: min(k / 5, 1.0))
        start = nn.utils.parameters_to_vector(model.parameters())
        assert optimizer.param_groups[0]["lr"] == 0.0 and optimizer.param_groups is inner.param_groups
        found = train(model, optimizer, pre, 2, scheduler)
        assert inner.param_groups[0]["lr"] == 0.1 and pre.stats["steps"] == 24
        assert found[-1] > 0.9 and not torch.equal(start, nn.utils.parameters_to_vector(model.parameters()))
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*results)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    optimizer.step()
    cycle.step()
    assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] != 0.1


def test_compiled_model_in_a_loop_with_update() -> None:
    results = []
    for compiled in (False, True):
        model = mlp(20, 32, 8)
        pre = ng.Preconditioner(model, LIKELIHOOD)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = ng.Preconditioned(torch.optim.AdamW(model.parameters(), **ADAMW), pre)
        x, y = blobs()
        for rows in torch.arange(1200).split(200):
            optimizer.zero_grad()
            LIKELIHOOD.nll(call(x[rows]), y[rows]).backward()
            pre.update(x[rows])
            optimizer.step()
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_closures_are_evaluated_and_preconditioned() -> None:
    x, y = (t[:100] for t in blobs())
    results = []
    for with_closure in (False, True):
        model = mlp(20, 32, 8)
        pre = ng.Preconditioner(model, LIKELIHOOD)
        optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), **SGD), pre)
        calls = []

        def closure(optimizer: Any = optimizer, model: Any = model, pre: Any = pre, calls: Any = calls) -> Tensor:
            optimizer.zero_grad()
            z = model(x)
            loss = LIKELIHOOD.nll(z, y)
            pre.observe(z)
            loss.backward()
            calls.append(loss.item())
            return loss

        for _ in range(3):
            if with_closure:
                with torch.no_grad():  # the closure needs gradients whatever the mode outside
                    loss = optimizer.step(closure)
                assert loss.item() == calls[-1]
            else:
                closure()
                assert optimizer.step() is None
        assert len(calls) == 3
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*results)


def test_an_inner_optimiser_that_evaluates_the_closure_repeatedly() -> None:
    x, y = (t[:200] for t in blobs())
    model = mlp(20, 32, 8)
    pre = ng.Preconditioner(model, LIKELIHOOD, scaling=None, damping=0.1)
    optimizer = ng.Preconditioned(torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3), pre)
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = model(x)
        loss = LIKELIHOOD.nll(z, y)
        pre.observe(z)
        loss.backward()
        losses.append(loss.item())
        return loss

    first = optimizer.step(closure).item()
    assert first == losses[0] and len(losses) == 3 and pre.stats["steps"] == 1
    assert losses[-1] < losses[0]


def test_nan_gradients_leave_everything_as_it_was() -> None:
    x, y = (t[:100] for t in blobs())
    model = mlp(20, 32, 8)
    pre = ng.Preconditioner(model, LIKELIHOOD)
    optimizer = ng.Preconditioned(torch.optim.AdamW(model.parameters(), **ADAMW), pre)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        z = model(x)
        pre.observe(z)
        LIKELIHOOD.nll(z, y).backward()
        optimizer.step()

    step(x)
    before, state = copy.deepcopy(list(model.parameters())), copy.deepcopy(optimizer.state_dict())
    bad = x.clone()
    bad[7, 3] = math.nan
    step(bad)
    assert optimizer.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    now = optimizer.state_dict()
    for i, saved in state["state"].items():
        for key, value in saved.items():
            if key not in ("natgrad.skipped", "natgrad.generator"):
                assert torch.equal(value, now["state"][i][key]), key
    assert now["state"][0]["natgrad.skipped"] == 1
    step(x)
    assert pre.stats["steps"] == 2 and pre.stats["skipped"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_grad_scaler() -> None:
    x, y = (t[:100] for t in blobs())
    results = []
    for scale in (None, 2.0**10):
        model = mlp(20, 32, 8, dtype=torch.float64)
        pre = ng.Preconditioner(model, LIKELIHOOD)
        optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), **SGD), pre)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            z = model(x.double())
            pre.observe(z)
            scaler.scale(LIKELIHOOD.nll(z, y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_is_an_optimiser_like_any_other() -> None:
    model = mlp(20, 32, 8)
    head = nn.Linear(3, 3)
    inner = torch.optim.SGD(model.parameters(), **SGD)
    pre = ng.Preconditioner(model, LIKELIHOOD)
    optimizer = ng.Preconditioned(inner, pre)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert len(optimizer.param_groups) == 1 and optimizer.defaults == inner.defaults
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.5})
    assert len(inner.param_groups) == 2
    steps = []
    optimizer.register_step_post_hook(lambda *args: steps.append(1))
    model(torch.ones(2, 20)).sum().backward()
    with pytest.raises(RuntimeError, match="no curvature yet"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    z = model(torch.ones(2, 20))
    pre.observe(z)
    z.sum().backward()
    optimizer.step()
    assert steps == [1] and "Preconditioned" in repr(optimizer)
    with pytest.raises(TypeError, match="inner_optimizer"):
        ng.Preconditioned(pre, inner)
    with pytest.raises(TypeError, match="pre: expected"):
        ng.Preconditioned(inner, inner)
    with pytest.raises(ValueError, match=r"2\.weight"):
        ng.Preconditioned(torch.optim.SGD(model[0].parameters(), lr=0.1), pre)


def test_a_copy_is_refused() -> None:
    """``copy.deepcopy`` of a torch optimiser keeps its groups and state alone: what came out could not make a step."""
    model = mlp(20, 32, 8)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), **SGD), ng.Preconditioner(model, LIKELIHOOD))
    with pytest.raises(TypeError, match=r"cannot be copied; make a new one for the copied model"):
        copy.deepcopy(optimizer)
