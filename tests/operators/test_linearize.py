"""The hand-written linearised pass of chains against forward-mode differentiation."""

import pytest
import torch
from torch import nn

from natgrad.model_view import ModelView
from natgrad.operators.chain import Chain
from natgrad.operators.linearize import jacobian_products


def _mlp(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 4, bias=bias),
        nn.Sequential(nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid()),
        nn.Linear(3, 3, bias=bias),
        nn.Linear(3, 6),
        nn.ReLU(),
        nn.Linear(6, 2, bias=bias),
    ).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 4), (1,)])
def test_chain_tangents_equal_forward_mode(bias: bool, shape: tuple[int, ...]) -> None:
    model = _mlp(bias)
    view = ModelView(model)
    chain = Chain.of(view)
    assert chain is not None
    x = torch.randn(*shape, 5, dtype=torch.float64)
    recorded: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda m, args, out, name=name: recorded.update({name: args[0].detach()}))
        for name in chain.names
    ]
    z = model(x).detach()
    for hook in hooks:
        hook.remove()
    directions = [{name: torch.randn_like(p) for name, p in view.parameters.items()} for _ in range(2)]
    del directions[1]["0.weight"]  # a direction may leave a layer out
    directions[1].pop("0.bias", None)
    pairs = []
    for direction in directions:
        pair = {}
        for name in chain.names:
            if f"{name}.weight" in direction:
                pair[name] = (direction[f"{name}.weight"], direction.get(f"{name}.bias"))
        pairs.append(pair)
    found = chain.tangents(recorded, pairs)
    full = [{n: d.get(n, torch.zeros_like(p)) for n, p in view.parameters.items()} for d in directions]
    z_again, expected = jacobian_products(view, x, full)
    torch.testing.assert_close(z_again, z)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_one_direction_needs_no_vmap() -> None:
    view = ModelView(_mlp(True))
    x = torch.randn(2, 5, dtype=torch.float64)
    directions = [{name: torch.randn_like(p) for name, p in view.parameters.items()} for _ in range(2)]
    together = jacobian_products(view, x, directions)[1]
    for direction, tangent in zip(directions, together, strict=True):
        torch.testing.assert_close(jacobian_products(view, x, [direction])[1][0], tangent)


def test_what_is_not_a_chain() -> None:
    shared = nn.Linear(3, 3)
    for model in [
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)),
        nn.Sequential(shared, nn.Tanh(), shared),
        nn.Sequential(nn.Tanh(), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
        nn.Linear(3, 3),
    ]:
        assert Chain.of(ModelView(model)) is None
    assert Chain.of(ModelView(_mlp(True), forward=lambda model, x: model(x))) is None
