"""Backward passes of a chain of layers by hand, against automatic differentiation."""

import pytest
import torch
from torch import nn

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
