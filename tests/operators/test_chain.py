"""Backward passes of a chain of layers by hand, against automatic differentiation."""

import functools

import pytest
import torch
from oracles import networks
from torch import nn

import natgrad as ng
from natgrad.model_view import ModelView
from natgrad.operators.chain import _ROWS_AT_ONCE, Chain, ChainRecord


def passes(activation, rows):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), activation(), nn.Linear(4, 6, bias=False), nn.Linear(6, 3), activation(), nn.Linear(3, 2)
    ).double()
    chain = Chain.of(ModelView(model, None))
    assert chain is not None
    x = torch.randn(rows, 5, dtype=torch.float64)
    inputs, outputs = {}, {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda _, args, out, name=name: (
                    (inputs.update({name: args[0]}), outputs.update({name: out}))[1] and None
                )
            )
    z = model(x)
    cotangent = torch.randn_like(z)
    expected = dict(zip(outputs, torch.autograd.grad(z, list(outputs.values()), cotangent), strict=True))
    with torch.no_grad():
        inputs.clear()
        model(x)
    return chain, x, {name: a.detach() for name, a in inputs.items()}, cotangent, expected


@pytest.mark.parametrize("rows", [1, _ROWS_AT_ONCE, 2 * _ROWS_AT_ONCE + 3])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("consume", [False, True])
def test_output_gradients(activation, rows, consume) -> None:
    chain, x, inputs, cotangent, expected = passes(activation, rows)
    before = {name: a.clone() for name, a in inputs.items()}
    kept_cotangent, kept_x = cotangent.clone(), x.clone()
    record = ChainRecord(chain, inputs)
    some = torch.tensor([0, rows - 1])
    found = {}
    for name, a, g in record.layerwise(cotangent, consume=consume, keep=some):
        torch.testing.assert_close(a, before[name])  # as it was, for ∇W = gᵀ a
        found[name] = g.clone()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g)
        torch.testing.assert_close(record.kept[name], before[name][some])
    assert torch.equal(cotangent, kept_cotangent) and torch.equal(x, kept_x)
    if consume:
        assert not record.layer_inputs
    else:
        assert all(torch.equal(a, before[name]) for name, a in record.layer_inputs.items())


@pytest.mark.parametrize(
    "make",
    [ng.KFAC, ng.NaturalGradient, functools.partial(ng.EigenAdam, lr=0.01)],
    ids=["KFAC", "NaturalGradient", "EigenAdam"],
)
def test_one_activation_used_twice_is_two_activations(make) -> None:
    found = []
    for shared in (False, True):
        torch.manual_seed(0)
        tanh = nn.Tanh()
        model = nn.Sequential(
            nn.Linear(3, 4), tanh, nn.Linear(4, 4), tanh if shared else nn.Tanh(), nn.Linear(4, 2)
        ).double()
        x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
        opt = make(model, ng.Gaussian())
        losses = [float(opt.step(x, y)) for _ in range(3)]
        found.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert found[0][0] == found[1][0] and found[0][0][2] < found[0][0][0]
    assert torch.equal(found[0][1], found[1][1])


def test_what_is_no_chain() -> None:
    """A layer that occurs twice, and a layer, an activation or a container whose forward is somebody's own."""
    for name in ("layer_twice", "tied_bias", "layer_with_own_forward", "activation_with_own_forward"):
        assert Chain.of(ModelView(networks.case(name).model)) is None
    case = networks.case("mlp")
    chain = Chain.of(ModelView(case.model))
    assert chain is not None and chain.fits(case.z)
    for register in (
        lambda: case.model.register_forward_hook(lambda *call: None),
        lambda: case.model[1].register_forward_pre_hook(lambda *call: None),
        lambda: case.model[0].weight.register_hook(lambda gradient: 0 * gradient),
    ):
        handle = register()
        assert not chain.fits(case.z)
        handle.remove()
        assert chain.fits(case.z)


@pytest.mark.parametrize("make", [ng.KFAC, ng.NaturalGradient], ids=["KFAC", "NaturalGradient"])
def test_an_activation_exchanged_after_the_optimiser_was_made(make) -> None:
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh() if late else nn.Sigmoid(), nn.Linear(4, 2)).double()
        x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
        opt = make(model, ng.Gaussian(), damping=0.5)
        model[1] = nn.Sigmoid()
        found.append([float(opt.step(x, y)) for _ in range(3)])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("hooked", ["", "0", "1"], ids=["model", "layer", "activation"])
def test_step_sizes_of_a_model_with_somebody_elses_hook(hooked) -> None:
    """J v along K-FAC's direction, hooks included: by hand and by automatic differentiation."""
    found = []
    for forward in (None, lambda model, inputs: model(inputs)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        model.get_submodule(hooked).register_forward_hook(lambda module, arguments, out: 2 * out)
        x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
        opt = ng.KFAC(model, ng.Gaussian(), damping=1.0, forward=forward, subsets=ng.Subsets(1, 1))
        losses = [float(opt.step(x, y)) for _ in range(3)]
        found.append([*losses, opt.stats["alpha"], opt.stats["rho"]])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
