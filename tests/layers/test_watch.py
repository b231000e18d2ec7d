"""Forward passes recorded in a user's own loop: the right calls, and nothing left behind."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from natgrad.layers.capture import Capture
from natgrad.layers.watch import Watch


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def watched(model: nn.Module) -> tuple[Capture, Watch]:
    capture = Capture(model, {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    return capture, Watch(model, capture)


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_takes_the_calls_that_computed_z_and_no_others() -> None:
    model = mlp()
    _, watch = watched(model)
    z1, z2 = model(X), model(2 * X)
    with torch.no_grad():
        model(3 * X)
    second, first = watch.take(z2), watch.take(z1)
    assert torch.equal(first.inputs["0"][0], X) and torch.equal(second.inputs["0"][0], 2 * X)
    c = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(first.output_gradients(z1, c)["2"][0], c)
    torch.testing.assert_close(first.output_gradients(z1, c)["0"][0], (c @ model[2].weight) * (model[0](X) > 0))
    with pytest.raises(RuntimeError, match="does not come from a forward pass"):
        watch.take(z1)  # handed out once


def test_two_passes_in_one_z_are_both_taken() -> None:
    model = mlp()
    _, watch = watched(model)
    z = torch.cat([model(X), model(2 * X)])
    record = watch.take(z)
    assert [a.sum() for a in record.inputs["0"]] == [X.sum(), (2 * X).sum()]


def test_passes_without_a_graph_or_while_inactive_are_not_recorded() -> None:
    model = mlp()
    _, watch = watched(model)
    with torch.no_grad():
        z = model(X)
    with pytest.raises(ValueError, match="no graph"):
        watch.take(z)
    z = model(X)
    watch.active = False
    assert watch._passes == []
    z = model(X)
    with pytest.raises(RuntimeError, match="update"):
        watch.take(z)
    watch.active = True
    torch.func.vmap(model)(X)
    torch.func.jacrev(lambda x: model(x))(X)
    assert watch._passes == []


@pytest.mark.parametrize("training", [True, False])
def test_unasked_passes_do_not_pile_up(training: bool) -> None:
    model = mlp().train(training)
    _, watch = watched(model)
    for _ in range(20):
        model(X)
    assert len(watch._passes) == (8 if training else 1)
    watch.clear()
    assert watch._passes == []


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.layer, self.error, self.fails = nn.Linear(3, 2).double(), error, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.layer(x)
        if self.fails:
            raise self.error("in the middle")
        return s


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_in_the_forward_pass(error: type[BaseException]) -> None:
    model = Failing(error)
    capture, watch = watched(model)
    with pytest.raises(error):
        model(X)
    if error is KeyboardInterrupt:  # PyTorch runs no hook then
        watch.clear()
    assert not capture.recording and watch._passes == []
    model.fails = False
    z = model(X)
    assert watch.take(z).calls == {"layer": 1}


def test_copies_are_inert_and_hooks_go_with_the_watch() -> None:
    model = mlp()
    capture, watch = watched(model)
    twin = copy.deepcopy(model)
    twin(X)
    assert watch._passes == []
    reference = weakref.ref(watch)
    del watch
    gc.collect()
    assert reference() is None and len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
    del capture
    gc.collect()
    assert len(model[0]._forward_hooks) == 0


class Recomputed(nn.Sequential):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def test_checkpointed_passes() -> None:
    model = Recomputed(*mlp())
    _, watch = watched(model)
    z = model(X)
    record = watch.take(z)
    gradients = record.output_gradients(z, torch.ones_like(z))  # recomputes; hooks stay silent
    assert record.calls == {"0": 1, "2": 1} and watch._passes == []
    torch.testing.assert_close(gradients["0"][0], (torch.ones_like(z) @ model[2].weight) * (model[0](X) > 0))
    model.reentrant = True
    z = model(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="0, 2.*use_reentrant=False"):
        watch.take(z)


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_passes_are_not_seen(hooked: str, backend: str) -> None:
    model = mlp()
    parts = watched(model) if hooked == "before" else None
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    plain = compiled(X)
    parts = parts or watched(model)
    z = compiled(X)
    torch.testing.assert_close(z, plain)
    with pytest.raises(RuntimeError, match="update"):
        parts[1].take(z)
    torch._dynamo.reset()
