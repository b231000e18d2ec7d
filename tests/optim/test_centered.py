"""CenteredSGD against gradients taken at centred inputs by automatic differentiation."""

import copy
import io

import pytest
import torch
from oracles.networks import case
from oracles.networks import targets as targets_for
from oracles.preconditioning import batch, mlp, targets
from torch import Tensor, nn

import natgrad as ng

LIKELIHOODS = {
    "gaussian": ng.Gaussian(variance=0.7),
    "bernoulli": ng.Bernoulli(normalizer="element"),
    "categorical": ng.Categorical(normalizer="none"),
}


class Centring(nn.Module):
    """A linear layer fed with h − h̄ that returns what the layer returns for h: gradients as Algorithm 2 has them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        mean = h.reshape(-1, h.shape[-1]).mean(0).detach()
        inputs = self.layer.weight @ mean  # the offset that centring takes away; its gradient is not wanted
        # The signal to the layers below is that of the ordinary network: h̄ counts as a constant.
        return nn.functional.linear(h - mean, self.layer.weight, self.layer.bias) + inputs.detach()


def centred_twin(model: nn.Sequential) -> nn.Sequential:
    twin = copy.deepcopy(model)
    return nn.Sequential(*(Centring(m) if isinstance(m, nn.Linear) and m.bias is not None else m for m in twin))


def parameters(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("family", LIKELIHOODS)
@pytest.mark.parametrize("micro", [None, 5])
def test_the_step_is_the_gradient_with_centred_inputs(family: str, micro: int | None) -> None:
    likelihood, model, x = LIKELIHOODS[family], mlp(4, 5, 3), batch() + 1.5
    y = targets(likelihood)
    twin = centred_twin(model)
    before = parameters(model)
    loss = likelihood.nll(twin(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(twin.parameters()))])
    optimizer = ng.CenteredSGD(model, likelihood, lr=0.3)
    found = optimizer.step(x, y, micro_batch_size=micro)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(parameters(model), before - 0.3 * gradient, rtol=1e-10, atol=1e-12)


def test_a_layer_without_bias_and_other_modules_keep_their_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch() + 1, targets(ng.Gaussian())
    plain = torch.autograd.grad(ng.Gaussian().nll(model(x), y), list(model.parameters()))
    h = model[:3](x).detach()
    before = [p.detach().clone() for p in model.parameters()]
    ng.CenteredSGD(model, ng.Gaussian(), lr=1.0).step(x, y)
    steps = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    expected = list(plain)
    expected[3] = plain[3] - torch.outer(plain[4], h.mean(0))
    for step, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(step, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sequence", "tuple", "mapping", "in_place", "forward", "tied", "batch_norm_eval"])
def test_models_of_many_kinds(name: str) -> None:
    """The centred step moves every bias as SGD does, and lowers the loss."""
    found = case(name)
    y = targets_for("gaussian", found.z)
    plain = copy.deepcopy(found.model)
    call = found.forward or (lambda m, x: m(*x) if isinstance(x, tuple) else m(**x) if isinstance(x, dict) else m(x))
    loss = ng.Gaussian().nll(call(plain, found.x), y)
    gradients = dict(
        zip(dict(plain.named_parameters()), torch.autograd.grad(loss, list(plain.parameters())), strict=True)
    )
    ng.CenteredSGD(found.model, ng.Gaussian(), lr=1e-3, forward=found.forward).step(found.x, y)
    for (key, p), (_, old) in zip(found.model.named_parameters(), plain.named_parameters(), strict=True):
        if p.ndim == 1:
            torch.testing.assert_close(old - p, 1e-3 * gradients[key], rtol=1e-9, atol=1e-13)
    assert ng.Gaussian().nll(call(found.model, found.x), y) < loss


def test_momentum_and_a_schedule_equal_torch_on_centred_gradients() -> None:
    model, x, y = mlp(4, 5, 3), batch() + 1, targets(ng.Gaussian())
    twin = mlp(4, 5, 3)
    ours = ng.CenteredSGD(model, ng.Gaussian(), lr=0.1, momentum=0.8)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.8)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    for _ in range(6):
        ours.step(x, y)
        theirs.zero_grad()
        ng.Gaussian().nll(twin(x), y).backward()
        with torch.no_grad():
            for layer, h in ((twin[0], x), (twin[2], torch.tanh(twin[0](x)))):
                layer.weight.grad -= torch.outer(layer.bias.grad, h.mean(0))
        theirs.step()
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["centered", "acp", "acp low rank"])
def test_a_state_continues_bit_for_bit_and_a_bad_batch_changes_nothing(kind: str) -> None:
    def make(model: nn.Module) -> ng.CenteredSGD | ng.ACP:
        if kind == "centered":
            return ng.CenteredSGD(model, ng.Gaussian(), lr=0.1, momentum=0.9)
        examples = 2 if "low" in kind else None
        return ng.ACP(model, ng.Gaussian(), lr=0.1, momentum=0.9, every=3, damping=0.2, examples=examples)

    model, y = mlp(6, 5, 3), targets(ng.Gaussian())
    optimizer = make(model)
    for seed in range(4):
        optimizer.step(batch(d=6, seed=seed), y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = mlp(6, 5, 3, seed=5)
    again.load_state_dict(saved["model"])
    other = make(again)
    other.load_state_dict(saved["optimizer"])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    vector = parameters(model)
    bad = batch(d=6, seed=9)
    bad[3, 2] = torch.nan
    optimizer.step(bad, y)
    assert torch.equal(parameters(model), vector) and optimizer.stats["skipped"] == 1
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[index][key]), key
    other.step(bad, y)
    for seed in range(4, 9):
        a, b = (o.step(batch(d=6, seed=seed), y) for o in (optimizer, other))
        assert torch.equal(a, b)
    assert torch.equal(parameters(model), parameters(again))
    assert other.stats["skipped"] == 1 and other.stats["updates"] == 10


def test_what_is_refused() -> None:
    model, x, y = mlp(4, 3), batch(), targets(ng.Gaussian())
    with pytest.raises(ValueError, match="lr=-1"):
        ng.CenteredSGD(model, ng.Gaussian(), lr=-1.0)
    with pytest.raises(ValueError, match="momentum=1"):
        ng.CenteredSGD(model, ng.Gaussian(), lr=0.1, momentum=1.0)
    optimizer = ng.CenteredSGD(model, ng.Gaussian(), lr=0.1)
    with pytest.raises(TypeError, match="Preconditioner"):
        optimizer.step(closure=lambda: None)
    with pytest.raises(TypeError, match="inputs are missing"):
        optimizer.step()
    with pytest.raises(ValueError, match="targets: 5 examples for 12"):
        optimizer.step(x, y[:5])
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.step() is None
    assert "0" in str(optimizer.coverage())
