"""A preconditioner in every situation that is known to fool hooks: the numbers of the plain model."""

import copy
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, damped_solve, exact, fisher, gradient, mlp, plain, targets, train_once
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad as ng


class Wrapped(nn.Module):
    """Runs a model in some way."""

    def __init__(self, model: nn.Module, how: Any) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.model, x)


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.SiLU(inplace=True)])
def test_in_place_activations(activation: Any) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3, activation=activation), batch(), targets(likelihood)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    torch.testing.assert_close(F, fisher(reference, likelihood, x).to_dense(), rtol=1e-12, atol=0)
    found = train_once(model, exact(model, likelihood), likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)


def test_checkpointed_models() -> None:
    likelihood = ng.Categorical()
    inner, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    expected = train_once(inner, exact(inner, likelihood), likelihood, x, y)
    inner.zero_grad()
    model = Wrapped(inner, lambda m, x: checkpoint(m, x, use_reentrant=False))
    torch.testing.assert_close(train_once(model, exact(model, likelihood), likelihood, x, y), expected)
    model = Wrapped(inner, lambda m, x: checkpoint(m, x.requires_grad_(), use_reentrant=True))
    pre = exact(model, likelihood)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        pre.observe(model(x.clone()))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        pre.update(x.clone())
    with pytest.raises(RuntimeError, match="no curvature yet"):
        exact(model, likelihood).step()


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(made: str, backend: str) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model.zero_grad()
    pre = exact(model, likelihood) if made == "before" else None
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    pre = pre or exact(compiled, likelihood)
    z = compiled(x)
    with pytest.raises(RuntimeError, match=r"update\(x\)"):
        pre.observe(z)
    pre.update(x)
    likelihood.nll(z, y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    assert set(pre.state_dict()["layers"]) == {"0", "2"}
    torch._dynamo.reset()


def test_part_of_a_model_that_is_compiled_is_not_missed() -> None:
    model = mlp(4, 3, 3)
    model[0].compile(backend="eager")
    pre = exact(model, ng.Categorical())
    with pytest.raises(ValueError, match="layer '0'.*without calling it"):
        pre.observe(model(batch()))
    torch._dynamo.reset()


def test_deepcopied_model_has_a_life_of_its_own() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    twin = copy.deepcopy(model)
    expected = train_once(model, pre, likelihood, x, y)
    with pytest.raises(RuntimeError, match="does not come from"):
        pre.observe(twin(x))
    torch.testing.assert_close(train_once(twin, exact(twin, likelihood), likelihood, x, y), expected)
    torch.optim.swa_utils.AveragedModel(model)(x)
    assert pre._watch._passes == []


def test_inputs_changed_in_place_later() -> None:
    model, x = mlp(4, 3, 3), batch()
    pre = exact(model, ng.Categorical())
    z = model(x)
    x += 1
    with pytest.raises(RuntimeError, match="layer '0' was changed in place"):
        pre.observe(z)
    z = model(x)
    pre.observe(z)
    x += 1  # after the statistics it does no harm


def test_a_failing_forward_pass_leaves_nothing_behind() -> None:
    likelihood = ng.Categorical()

    def fail(model: nn.Module, x: Tensor) -> Tensor:
        z = model(x)
        if x.shape[1] == 4 and x[0, 0] == 99:
            raise RuntimeError("in the middle")
        return z

    model, x, y = Wrapped(mlp(4, 3, 3), fail), batch(), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    pre = exact(model, likelihood)
    bad = x.clone()
    bad[0, 0] = 99
    for call in (lambda: model(bad), lambda: pre.update(bad)):
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
        assert not pre.capture.recording and pre._watch._passes == []
    torch.testing.assert_close(train_once(model, pre, likelihood, x, y), expected)
    layer = model.model[0]
    assert len(layer._forward_hooks) == 1
    del pre
    assert len(layer._forward_hooks) == 0 and len(model._forward_pre_hooks) == 0
