"""PRONG: whitened inputs, an unchanged network, ACP's step, and the way back."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from oracles.networks import case
from oracles.networks import targets as targets_for
from oracles.preconditioning import batch, mlp, targets
from torch import Tensor, nn

import natgrad as ng
from natgrad.layers.whitened import WhitenedLinear
from natgrad.model_view import call_model

GAUSSIAN = ng.Gaussian()


def layer_inputs(model: nn.Module, x: Any, call: Any = call_model) -> dict[str, Tensor]:
    """What enters every linear layer, as rows."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        call(model, x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("damping", "examples"), [(0.0, None), (0.3, None), (0.3, 12)])
def test_the_effective_input_is_white_and_centred(damping: float, examples: int | None) -> None:
    width = 30 if examples else 4
    model, x = mlp(width, 5, 3), batch(n=12 if examples else 40, d=width) @ batch(n=width, d=width, seed=3) + 2.0
    prong = ng.PRONG(model, damping=damping, examples=examples)
    model(x)  # the first pass in training mode whitens by its own batch
    assert prong.stats["renewals"] == 1 and prong.stats["failed"] == 0
    inputs = layer_inputs(model, x)
    for name, layer in prong.layers.items():
        h = inputs[name]
        C = torch.cov(h.T, correction=0)
        eye = torch.eye(len(C), dtype=C.dtype)
        effective = layer.effective_input(h)
        torch.testing.assert_close(effective.mean(0), torch.zeros(len(C), dtype=C.dtype), rtol=0, atol=1e-9)
        found = torch.cov(effective.T, correction=0)
        expected = C @ torch.linalg.inv(C + damping * eye) if damping else eye
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    assert [layer.rank for layer in prong.layers.values()] == ([12, None] if examples else [None, None])


@pytest.mark.parametrize("examples", [None, 3])
def test_rewriting_whitening_and_giving_back_leave_the_outputs(examples: int | None) -> None:
    model, x = mlp(9, 8, 3), batch(d=9) + 1
    parameters, names = list(model.parameters()), list(model.state_dict())
    z = model(x).detach()
    prong = ng.PRONG(model, every=2, damping=0.1, examples=examples)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.testing.assert_close(model(x).detach(), z, rtol=0, atol=1e-10)
    y = targets(GAUSSIAN)
    for step in range(5):
        optimizer.zero_grad()
        GAUSSIAN.nll(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            before = model(x)
            prong.rewhiten(batch(d=9, seed=step) * 2 - 1)
            torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
            torch.testing.assert_close(model(x[:1]), before[:1], rtol=0, atol=1e-10)  # few rows go another way
            prong.rewhiten()
            torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
    assert (before - z).abs().max() > 0.1
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert prong.remove() is model
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-10)
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == names
    assert model[0]._buffers == {} and not vars(model[0]).keys() & {"rank", "centred"}
    assert not model._forward_pre_hooks and not model[0]._forward_hooks
    with pytest.raises(RuntimeError, match="was removed"):
        prong.rewhiten(x)


@pytest.mark.parametrize("examples", [None, 12])
def test_a_gradient_step_in_V_is_an_acp_step_in_W(examples: int | None) -> None:
    width = 30 if examples else 4
    model, x, y = mlp(width, 5, 3), batch(d=width) + 0.8, targets(GAUSSIAN)
    twin = copy.deepcopy(model)
    prong = ng.PRONG(model, damping=0.2, examples=examples)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    acp = ng.ACP(twin, GAUSSIAN, lr=0.1, alpha=1.0, damping=0.2, damp_bias=False, examples=examples)
    loss = GAUSSIAN.nll(model(x), y)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(acp.step(x, y), loss.detach(), rtol=1e-9, atol=0)
    plain = copy.deepcopy(model)
    prong.remove()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-10)  # a copy is whitened still


def test_renewals_count_updates_not_passes() -> None:
    model, x, y = mlp(4, 5, 3), batch(), targets(GAUSSIAN)
    prong = ng.PRONG(model, every=2, damping=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    renewals = []
    for _ in range(5):
        optimizer.zero_grad()
        for part in (slice(0, 6), slice(6, 12)):  # accumulated: the graph of the first pass stays valid
            (GAUSSIAN.nll(model(x[part]), y[part]) / 2).backward()
        optimizer.step()
        with torch.no_grad():
            model(x)
        renewals.append(prong.stats["renewals"])
        model.eval()
        model(x)
        model.train()
    assert renewals == [1, 1, 2, 2, 3] and prong.stats["updates"] == 4


@pytest.mark.parametrize(
    "name", ["sequence", "tuple", "mapping", "in_place", "tied", "frozen", "no_bias", "layer_norm"]
)
def test_models_of_many_kinds(name: str) -> None:
    found = case(name)
    z = found.z
    parameters = list(found.model.parameters())
    y = targets_for("gaussian", z)
    if name == "tied":
        with pytest.raises(ValueError, match=r"no nn\.Linear layer"):
            ng.PRONG(found.model)
        return
    prong = ng.PRONG(found.model, damping=0.05)
    out = call_model(found.model, found.x)
    assert prong.stats["failed"] == 0
    torch.testing.assert_close(out.detach(), z, rtol=0, atol=1e-10)
    loss = GAUSSIAN.nll(out, y)
    loss.backward()
    with torch.no_grad():
        for p in found.model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
        after = call_model(found.model, found.x)
        assert GAUSSIAN.nll(after, y) < loss
        prong.remove()
        torch.testing.assert_close(call_model(found.model, found.x), after, rtol=0, atol=1e-10)
    assert all(a is b for a, b in zip(parameters, found.model.parameters(), strict=True))


def test_a_layer_without_bias_is_whitened_uncentred() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)).double(), batch() + 1
    prong = ng.PRONG(model, damping=0.0)
    model(x)
    effective = prong.layers["0"].effective_input(x)
    torch.testing.assert_close(effective.T @ effective / len(x), torch.eye(4, dtype=x.dtype), rtol=1e-9, atol=1e-10)


def test_the_gradient_is_that_of_automatic_differentiation_either_way() -> None:
    """Few rows whiten the rows, many whiten V: one function, the same gradients, also of the input."""
    model, x = mlp(4, 5), batch(n=3)
    prong = ng.PRONG(model, damping=0.1)
    prong.rewhiten(batch(n=20, seed=4) + 1)
    layer = prong.layers["0"]
    few = x.clone().requires_grad_()
    many = torch.cat([x, *[x * 0] * 5]).requires_grad_()
    gradients = []
    for inputs in (few, many):
        out = layer(inputs)[:3].sin().sum()
        gradients.append(torch.autograd.grad(out, [layer.weight, layer.bias, inputs]))
    U, mu = layer.whitening.to_dense(), layer.mean
    expected = ((x - mu) @ U @ layer.weight.T + layer.bias).cos()
    for weight, bias, inputs in gradients:
        torch.testing.assert_close(weight, expected.T @ (x - mu) @ U, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(bias, expected.sum(0), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(inputs[:3], expected @ layer.weight @ U, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("examples", [None, 2])
def test_first_and_second_derivatives_and_both_modes(examples: int | None, bias: bool) -> None:
    """Of the function that is written out, against numbers; forward mode, and the single operations beside it."""
    layer = WhitenedLinear.convert(nn.Linear(5, 3, bias=bias, dtype=torch.float64), examples, 0.2)
    h = batch(n=7, d=5) + 1
    assert layer.rewhiten(batch(n=9, d=5, seed=2) + 2, 0.2)
    primals = [p.detach().clone().requires_grad_() for p in (h, *layer.parameters())]
    names = [name for name, _ in layer.named_parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, primals, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(outputs, primals)
    tangents = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype) for p in primals]
    tangent = torch.func.jvp(outputs, tuple(p.detach() for p in primals), tuple(tangents))[1]  # the single operations
    direct = torch.autograd.functional.jvp(outputs, tuple(primals), tuple(tangents))[1]
    torch.testing.assert_close(direct, tangent, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("examples", [None, 2])
def test_a_state_continues_bit_for_bit(examples: int | None) -> None:
    def make(seed: int) -> tuple[nn.Module, ng.PRONG, torch.optim.Optimizer]:
        model = mlp(6, 5, 3, seed=seed)
        prong = ng.PRONG(model, every=3, damping=0.1, examples=examples)
        return model, prong, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            GAUSSIAN.nll(model(batch(d=6, seed=seed)), targets(GAUSSIAN)).backward()
            optimizer.step()

    model, prong, optimizer = make(0)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, prong, optimizer)], file)
    file.seek(0)
    other = make(1)
    for part, state in zip((other[0], other[1], other[2]), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(model, optimizer, range(6, 13))
    train(other[0], other[2], range(6, 13))
    assert prong.stats["renewals"] == other[1].stats["renewals"] == 5
    for a, b in zip(model.state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_copies_are_inert_and_pickles_too() -> None:
    model, x = mlp(4, 5, 3), batch()
    prong = ng.PRONG(model, every=1, damping=0.1)
    z = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x).detach(), z, rtol=0, atol=1e-12)
        with torch.no_grad():
            twin[0].weight.mul_(2.0)
        twin(x)
        for layer in twin:
            if isinstance(layer, WhitenedLinear):
                layer.restore()
        assert type(twin[0]) is nn.Linear
    assert prong.stats["updates"] == 0 and prong.stats["renewals"] == 1


def test_batch_norm_and_dropout_see_one_pass() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()

    model, plain, x = build(), build(), batch()
    prong = ng.PRONG(model, damping=0.1)
    torch.manual_seed(3)
    z = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(z, plain(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, rtol=1e-10, atol=1e-12)
    assert model[1].num_batches_tracked == 1 and prong.stats["renewals"] == 1


def test_a_covariance_without_a_root_leaves_its_layer() -> None:
    model, x = mlp(4, 5, 3), batch()
    x[:, 1] = 1.0
    z = model(x).detach()
    prong = ng.PRONG(model, damping=0.0)
    torch.testing.assert_close(model(x).detach(), z, rtol=0, atol=1e-10)
    assert prong.stats["failed"] == 1 and torch.equal(model[0].root, torch.eye(4, dtype=x.dtype))
    x[3, 3] = torch.nan
    weights = model[2].weight.detach().clone()
    prong.rewhiten(x)
    assert torch.equal(model[2].weight, weights) and prong.stats["failed"] == 3


def test_mixed_precision_is_that_of_an_ordinary_layer() -> None:
    layer = WhitenedLinear.convert(nn.Linear(5, 3))
    h = batch(n=20, d=5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(h)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(h), rtol=0.05, atol=0.05)


def test_float32_stays_and_trains() -> None:
    model, x, y = mlp(4, 8, 3).float(), batch().float(), targets(GAUSSIAN).float()
    ng.PRONG(model, every=5, damping=1e-2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = GAUSSIAN.nll(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0] and model[0].weight.dtype == torch.float32


def test_what_is_refused() -> None:
    model = mlp(4, 3)
    for settings, message in (
        ({"every": 0}, "every=0"),
        ({"damping": -1.0}, "damping=-1"),
        ({"examples": 0}, "examples=0"),
    ):
        with pytest.raises(ValueError, match=message):
            ng.PRONG(model, **settings)
    assert type(model[0]) is nn.Linear
    prong = ng.PRONG(model)
    with pytest.raises(RuntimeError, match="rewhiten: no inputs yet"):
        prong.rewhiten()
    with pytest.raises(ValueError, match="rewrote them already"):
        ng.PRONG(model)
    with pytest.raises(ValueError, match="state_dict"):
        prong.load_state_dict({"updates": 1})
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Tanh"):
        WhitenedLinear.convert(nn.Tanh())
