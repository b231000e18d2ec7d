"""Products with the Jacobian of a chain by hand are those of automatic differentiation, for one column and several."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad as ng
from natgrad.model_view import ModelView
from natgrad.operators.chain import Chain
from natgrad.operators.chain_products import ChainProducts, frozen_products, linearize
from natgrad.operators.jacobian_products import JacobianProducts

ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.Identity, None]


def chain(widths: list[int], activations: list[int], biases: list[bool]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i, (columns, out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        modules.append(nn.Linear(columns, out, bias=biases[i % len(biases)]))
        kind = ACTIVATIONS[activations[i % len(activations)]]
        if i < len(widths) - 2 and kind is not None:
            modules.append(kind())
    return nn.Sequential(*modules).double()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    activations=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    biases=st.lists(st.booleans(), min_size=1, max_size=3),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    k=st.integers(1, 4),
)
def test_products_are_those_of_automatic_differentiation(
    widths: list[int], activations: list[int], biases: list[bool], leading: list[int], k: int
) -> None:
    torch.manual_seed(0)
    model = chain(widths, activations, biases)
    view, x = ModelView(model), torch.randn(*leading, widths[0], dtype=torch.float64)
    products, expected = linearize(view, x, Chain.of(view)), JacobianProducts(view, x)
    v, u = (
        torch.randn(view.num_parameters, k, dtype=torch.float64),
        torch.randn(k, *expected.z.shape, dtype=torch.float64),
    )
    assert type(products) is ChainProducts
    torch.testing.assert_close(products.z, expected.z)
    torch.testing.assert_close(products.jvp(v), expected.jvp(v))
    torch.testing.assert_close(products.vjp(u), expected.vjp(u))
    torch.testing.assert_close(products.vjp(products.jvp(v)), expected.vjp(expected.jvp(v)))


def test_an_operator_is_a_value() -> None:
    torch.manual_seed(0)
    model, x = chain([3, 4, 2], [0], [True]), torch.randn(5, 3, dtype=torch.float64)
    fisher, v = ng.Fisher(model, ng.Gaussian(), x), torch.randn(26, 3, dtype=torch.float64)
    assert type(fisher._products) is ChainProducts
    before = fisher @ v
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        x.zero_()
    torch.testing.assert_close(fisher @ v, before, rtol=0, atol=0)


def test_a_chain_that_is_none_for_this_call_takes_the_general_way() -> None:
    torch.manual_seed(0)
    model, x = chain([3, 4, 2], [0], [True]), torch.randn(5, 3, dtype=torch.float64)
    view = ModelView(model)

    def doubled(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return 2 * out

    with torch.inference_mode():
        assert type(frozen_products(view, x)) is ChainProducts
    handle = model[0].register_forward_hook(doubled)
    assert type(frozen_products(view, x)) is JacobianProducts
    handle.remove()
    assert type(frozen_products(view, x)) is ChainProducts
    with pytest.raises(ValueError, match="chunk_size"):
        frozen_products(view, x, 0)
    with pytest.raises(ValueError, match="not finite"):
        frozen_products(view, x * torch.nan)


def test_weight_normalised_layers_are_no_chain() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Tanh(), nn.Linear(2, 1))
    assert Chain.of(ModelView(model)) is None
