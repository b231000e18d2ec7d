"""Steps that are undone on the device, where an accelerator cannot read whether a gradient is finite."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.classifier import LIKELIHOOD, blobs, mlp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad as ng
from natgrad.optim import preconditioned
from natgrad.optim.undoable import all_finite, step_where

INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


class NoWait(TorchDispatchMode):
    """Refuses what waits for a device: numbers that are read, shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioned, "reads_for_free", lambda x: False)


def made(name: str, **settings: Any) -> tuple[torch.nn.Module, ng.Preconditioner, ng.Preconditioned]:
    model = mlp(20, 32, 8)
    pre = ng.Preconditioner(model, LIKELIHOOD, **settings)
    return model, pre, ng.Preconditioned(INNER[name](model.parameters()), pre)


def steps_on(model: Any, pre: Any, optimizer: Any, x: Tensor, y: Tensor, closure: bool = False) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        z = model(x)
        pre.observe(z)
        loss = LIKELIHOOD.nll(z, y)
        loss.backward()
        return loss

    if closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def snapshot(model: Any, optimizer: Any) -> tuple[list[Tensor], dict[str, Any]]:
    return copy.deepcopy([p.data for p in model.parameters()]), copy.deepcopy(optimizer.inner.state_dict())


def same(one: tuple[list[Tensor], dict[str, Any]], two: tuple[list[Tensor], dict[str, Any]]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(one[0], two[0], strict=True))
    assert one[1]["state"].keys() == two[1]["state"].keys()
    for i, state in one[1]["state"].items():
        for key, value in state.items():
            assert value is None or torch.equal(value, two[1]["state"][i][key]), key


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_a_bad_step_is_undone_and_counted(name: str, closure: bool, accelerator: None) -> None:
    x, y = (t[:100] for t in blobs())
    model, pre, optimizer = made(name)
    bad = x.clone()
    bad[7, 3] = math.nan
    for batch in (x, x):
        steps_on(model, pre, optimizer, batch, y, closure)
    before, averages = snapshot(model, optimizer), copy.deepcopy(pre._running.factors)
    steps_on(model, pre, optimizer, bad, y, closure)
    same(before, snapshot(model, optimizer))
    assert optimizer.skipped == 1 and pre.stats["skipped"] == 1 and pre.stats["nonfinite"] == 1
    for name_, factors in averages.items():
        assert torch.equal(factors.A, pre._running.factors[name_].A)
    steps_on(model, pre, optimizer, x, y, closure)
    assert not torch.equal(before[0][0], next(model.parameters()))
    assert optimizer.skipped == 1 and all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.state_dict()["param_groups"][0]["natgrad.skipped_steps"] == 1


@pytest.mark.parametrize("name", INNER)
def test_good_steps_are_those_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a bad first step, before the inner optimiser has any state, leaves the next ones what they would be."""
    x, y = (t[:100] for t in blobs())
    found = []
    for waits in (False, True):
        monkeypatch.setattr(preconditioned, "reads_for_free", lambda _, waits=waits: waits)
        model, pre, optimizer = made(name, expectation="exact", periods=ng.Renewal(1, (), 1))
        steps_on(model, pre, optimizer, x * math.nan, y)
        for _ in range(3):
            steps_on(model, pre, optimizer, x, y)
        assert optimizer.skipped == 1
        found.append(snapshot(model, optimizer))
    same(*found)


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (t[:100] for t in blobs())
    for waits in (False, True):
        monkeypatch.setattr(preconditioned, "reads_for_free", lambda _, waits=waits: waits)
        model, pre, optimizer = made("sgd")
        steps_on(model, pre, optimizer, x, y)
        LIKELIHOOD.nll(model(x), y).backward()
        monkeypatch.setattr(pre, "step", lambda usable=None: None)  # what it reads on a CPU, it does not elsewhere
        if waits:
            with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWait():
                optimizer.step()
        else:
            with NoWait():
                optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_a_gpu() -> None:
    x, y = (t[:100].cuda() for t in blobs())
    model = mlp(20, 32, 8).cuda()
    pre = ng.Preconditioner(model, LIKELIHOOD, periods=ng.Renewal(inverses=100, early=(1,), statistics=2))
    optimizer = ng.Preconditioned(INNER["sgd"](model.parameters()), pre)
    for k in range(8):
        torch.cuda.set_sync_debug_mode("error" if k > 3 else "default")
        try:
            steps_on(model, pre, optimizer, x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped == 0


def test_gradients_of_all_kinds() -> None:
    sparse = torch.sparse_coo_tensor([[0, 2]], [1.0, math.inf], (3,))
    cpu = torch.device("cpu")
    assert not all_finite([torch.ones(3), sparse], cpu) and all_finite([torch.ones(3).half()], cpu)
    assert all_finite([], cpu) and not all_finite([torch.tensor([math.nan])], cpu)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.SGD([p], 0.5)
    assert step_where(torch.tensor(False), optimizer, lambda: 3.0) == 3.0 and torch.equal(p.data, torch.ones(2))
    step_where(torch.tensor(True), optimizer)
    assert torch.equal(p.data, torch.full((2,), 0.5))
