"""Small models and batches, float64, for tests of curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.model_view import call_model


@dataclass
class Case:
    """A model, a batch of inputs, and how it is called where the default does not fit."""

    model: nn.Module
    x: Any
    forward: Callable[[nn.Module, Any], Tensor] | None = None

    @property
    def z(self) -> Tensor:
        return (self.forward or call_model)(self.model, self.x).detach()


class Tied(nn.Module):
    """Encoder and decoder share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Scaled(nn.Module):
    """A parameter without dimensions, as a temperature is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.layer(x))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(self.left(a)) * self.right(b)


class Pair(nn.Module):
    """Returns a tuple; only `forward=` makes a z of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return torch.sin(self.layer(x)), "ignored"


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


def _tied_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    model[2].bias = model[0].bias
    return model


def _shared_activation() -> nn.Module:
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(3, 4), tanh, nn.Linear(4, 3), tanh, nn.Linear(3, 2))


def _layer_twice() -> nn.Module:
    layer, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    return nn.Sequential(layer, norm, nn.Tanh(), layer, norm, nn.Linear(3, 2)).eval()


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2))
    model.register_forward_hook(lambda module, arguments, out: 2 * out)
    return model


def _with_own_forward(index: int) -> nn.Module:
    model = _mlp(3, 3, 2)
    original = model[index].forward
    model[index].forward = lambda x: torch.sin(original(x))
    return model


def _mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


_BUILDERS: dict[str, Callable[[], tuple]] = {
    "mlp": lambda: (_mlp(3, 4, 2), torch.randn(4, 3)),
    "no_bias": lambda: (_mlp(3, 3, 2, bias=False), torch.randn(4, 3)),
    "batch_of_one": lambda: (_mlp(3, 3, 2), torch.randn(1, 3)),
    "tied": lambda: (Tied(), torch.randn(3, 3)),
    "tied_bias": lambda: (_tied_bias(), torch.randn(4, 3)),
    "layer_twice": lambda: (_layer_twice(), torch.randn(4, 3)),
    "shared_activation": lambda: (_shared_activation(), torch.randn(4, 3)),
    "hooked": lambda: (_hooked(), torch.randn(4, 3)),
    "layer_with_own_forward": lambda: (_with_own_forward(0), torch.randn(4, 3)),
    "activation_with_own_forward": lambda: (_with_own_forward(1), torch.randn(4, 3)),
    "scalar": lambda: (Scaled(), torch.randn(4, 3)),
    "layer_norm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 2)),
        torch.randn(4, 3),
    ),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2)),
        torch.randn(3, 1, 3, 3),
    ),
    "tuple": lambda: (TwoInputs(), (torch.randn(4, 2), torch.randn(4, 4))),
    "mapping": lambda: (TwoInputs(), {"a": torch.randn(4, 2), "b": torch.randn(4, 4)}),
    "sequence": lambda: (_mlp(3, 3, 3), torch.randn(3, 2, 3)),
    "frozen": lambda: (_frozen(), torch.randn(4, 3)),
    "forward": lambda: (Pair(), torch.randn(4, 3), lambda model, x: model(x)[0]),
    "in_place": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        torch.randn(4, 3),
    ),
    "batch_norm_eval": lambda: (
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).eval(),
        torch.randn(4, 3),
    ),
}
NAMES = tuple(_BUILDERS)


def case(name: str, seed: int = 0) -> Case:
    """The named model with its batch, the same at every call; the global generator is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x, *forward = _BUILDERS[name]()

    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(double(v) for v in value)
        return {k: double(v) for k, v in value.items()} if isinstance(value, dict) else value.double()

    return Case(model.double(), double(x), *forward)


def targets(family: str, z: Tensor, seed: int = 1) -> Tensor:
    """Targets of a family for z; Bernoulli ones are soft."""
    generator = torch.Generator().manual_seed(seed)
    if family == "gaussian":
        return torch.randn(z.shape, dtype=z.dtype, generator=generator)
    if family == "bernoulli":
        return torch.rand(z.shape, dtype=z.dtype, generator=generator)
    return torch.randint(z.shape[-1], z.shape[:-1], generator=generator)
