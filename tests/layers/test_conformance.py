"""The conformance suite: natgrad's own rules pass it, wrong ones do not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles.layers import draw
from torch import Tensor, nn

import natgrad as ng
from natgrad.layers import registry
from natgrad.layers.convolution import ConvolutionRule
from natgrad.layers.linear import LinearRule
from natgrad.layers.normalization import LastDimensionsRule
from natgrad.testing import check_layer

TOKENS = torch.tensor([[0, 1, 3], [2, 2, 5], [4, 1, 1], [1, 0, 2]])
LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "linear on a sequence": (lambda: nn.Linear(3, 2), (4, 5, 3)),
    "linear on a grid, no bias": (lambda: nn.Linear(3, 2, bias=False), (3, 2, 2, 3)),
    "conv 1d": (lambda: nn.Conv1d(2, 3, 3, padding="same"), (3, 2, 4)),
    "conv 2d circular": (lambda: nn.Conv2d(2, 2, (2, 3), padding=1, padding_mode="circular"), (3, 2, 3, 3)),
    "conv 2d strided": (lambda: nn.Conv2d(2, 2, 2, stride=2, dilation=2, padding=1, bias=False), (3, 2, 5, 4)),
    "conv 2d of one position": (lambda: nn.Conv2d(2, 2, 2), (3, 2, 2, 2)),
    "conv 3d": (lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (3, 1, 2, 2, 2)),
    "depthwise": (lambda: nn.Conv2d(2, 4, 2, groups=2), (3, 2, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1), (3, 2, 2, 2)),
    "transposed groups": (lambda: nn.ConvTranspose1d(2, 4, 2, stride=3, groups=2, dilation=2), (3, 2, 2)),
    "embedding": (lambda: nn.Embedding(6, 2), TOKENS),
    "embedding with padding": (lambda: nn.Embedding(6, 2, padding_idx=1), TOKENS),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 2, 4)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((2, 4)), (3, 2, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 2)),
    "batch norm, eval": (lambda: nn.BatchNorm2d(2).eval(), (3, 2, 2, 2)),
    "batch norm, train": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 3, 4)),
    "cell": (lambda: nn.GRUCell(3, 2), (4, 3)),
    "rnn": (lambda: nn.RNN(2, 2, 2, nonlinearity="relu", batch_first=True, bias=False), (3, 3, 2)),
    "lstm": (lambda: nn.LSTM(2, 2, batch_first=True, bidirectional=True), (3, 3, 2)),
    "lstm, projected": (lambda: nn.LSTM(2, 3, proj_size=2, batch_first=True), (3, 3, 2)),
    "gru": (lambda: nn.GRU(2, 2, 2, batch_first=True, bidirectional=True), (3, 3, 2)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = LAYERS[name]
    return make(), x if isinstance(x, Tensor) else draw(*x)


@pytest.mark.parametrize("name", LAYERS)
def test_the_rules_of_natgrad_pass(name: str) -> None:
    check_layer(*made(name))


@pytest.mark.parametrize("name", ["linear", "conv 2d circular", "layer norm"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_they_pass_with_a_part_frozen(name: str, frozen: str) -> None:
    layer, x = made(name)
    getattr(layer, frozen).requires_grad_(False)
    check_layer(layer, x)


class Polynomial(nn.Module):
    """``s = W [x, x²] + b``: a kind that natgrad does not know."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(out, 2 * d)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x**2], dim=-1) @ self.weight.T + self.bias


class PolynomialRule(ng.layers.KroneckerRule):
    def rows(self, use: ng.layers.Use) -> Tensor:
        x = use.input.reshape(use.input.shape[0], -1, use.input.shape[-1])
        return torch.cat([x, x**2], dim=-1)

    def gradient_rows(self, use: ng.layers.Use, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1, g.shape[-1])


@pytest.fixture
def registered() -> Iterator[Any]:
    """Registrations end with the test."""
    before = dict(registry._RULES)
    yield ng.register_layer
    registry._RULES.clear()
    registry._RULES.update(before)


def test_a_rule_of_ones_own(registered: Any) -> None:
    layer, x = Polynomial(3, 2), draw(4, 5, 3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(2, 2)).double()
    bare = ng.kronecker_fisher(model, ng.Gaussian(), x)
    assert list(bare.factors) == ["0.weight", "0.bias", "2"]  # diagonals without a rule
    registered(Polynomial, PolynomialRule())
    check_layer(layer, x)
    k = ng.kronecker_fisher(model, ng.Gaussian(), x)
    assert list(k.factors) == ["0", "2"] and "Kronecker 7 x 2" in str(k.coverage())
    pre = ng.Preconditioner(model, ng.Gaussian())
    pre.observe(model(x))
    ng.KFAC(model, ng.Gaussian()).step(x, draw(4, 5, 2))

    class Doubled(Polynomial):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="Doubled with a forward of its own"):
        ng.kronecker_fisher(nn.Sequential(Doubled(3, 2)).double(), ng.Gaussian(), x)


class WithoutBias(PolynomialRule):
    attributes = ("weight",)


class SwappedFeatures(PolynomialRule):
    def rows(self, use: Any) -> Tensor:
        return super().rows(use).flip(-1)


class HalfTheGradient(PolynomialRule):
    def gradient_rows(self, use: Any, g: Tensor) -> Tensor:
        return super().gradient_rows(use, g) / 2


class CountsExamples(PolynomialRule):
    def input_sum(self, block: Any, use: Any) -> tuple[Tensor, float]:
        return super().input_sum(block, use)[0], float(len(use.input))


class MeanNotSum(PolynomialRule):
    def output_sum(self, block: Any, use: Any, g: Tensor, total: Tensor) -> None:
        super().output_sum(block, use, g / len(g) ** 0.5, total)


class Transposed(PolynomialRule):
    def from_matrix(self, layer: Any, V: Tensor, names: Any) -> dict[str, Tensor]:
        parts = super().from_matrix(layer, V, names)
        return parts | {"weight": parts["weight"].flip(0)}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SwappedFeatures, "is not the gradient"),
        (HalfTheGradient, "is not the gradient"),
        (CountsExamples, "input_sum counts 4 rows, there are 20"),
        (MeanNotSum, "output_sum"),
        (Transposed, "from_matrix"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_rules_are_found(rule: Any, message: str, registered: Any) -> None:
    registered(Polynomial, rule())
    with pytest.raises(AssertionError, match=message):
        check_layer(Polynomial(3, 2), draw(4, 5, 3))


class ZeroPadding(ConvolutionRule):
    """What other libraries do with circular padding."""

    def patches(self, use: Any) -> Tensor:
        mode, use.layer.padding_mode = use.layer.padding_mode, "zeros"
        try:
            return super().patches(use)
        finally:
            use.layer.padding_mode = mode


class SumOfSquares(LastDimensionsRule):
    """Squares position by position."""

    def summed(self, use: Any, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])


def test_wrong_rules_of_known_kinds_are_found(registered: Any) -> None:
    registered(nn.Conv2d, ZeroPadding())
    with pytest.raises(AssertionError, match="is not the gradient"):
        check_layer(*made("conv 2d circular"))
    registered(nn.LayerNorm, SumOfSquares())
    with pytest.raises(AssertionError, match="6 rows for 3 examples"):
        check_layer(*made("layer norm"))


def test_a_parameter_that_a_rule_leaves_out_is_not_lost(registered: Any) -> None:
    registered(Polynomial, WithoutBias())
    k = ng.kronecker_fisher(Polynomial(3, 2).double(), ng.Gaussian(), draw(4, 3))
    assert list(k.factors) == ["", "bias"] and k.coverage().uncovered == ()


def test_bad_registrations() -> None:
    with pytest.raises(TypeError, match="kind: expected a subclass"):
        ng.register_layer("Linear", LinearRule())
    with pytest.raises(TypeError, match="the class LinearRule; make an object"):
        ng.register_layer(nn.Linear, LinearRule)
    with pytest.raises(TypeError, match="no single rule covers PReLU"):
        check_layer(nn.PReLU(), draw(4, 3))
    with pytest.raises(ValueError, match="three examples"):
        check_layer(nn.Linear(3, 2), draw(2, 3))
    with pytest.raises(ValueError, match="sharing='both'"):
        ng.kronecker_fisher(nn.Linear(3, 2), ng.Gaussian(), draw(2, 3), sharing="both")
    with pytest.raises(ValueError, match="no covered layer is called '1'"):
        ng.kronecker_fisher(nn.Sequential(nn.Linear(3, 2)).double(), ng.Gaussian(), draw(2, 3), sharing={"1": "reduce"})
