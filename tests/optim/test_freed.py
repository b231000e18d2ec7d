"""A step's graphs, with all their activations, are freed when it ends: none waits for the garbage collector."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng


class Attention(nn.Module):
    """A transformer layer between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x.view(-1, 4, 4))).mean(1))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutional() -> nn.Module:
    layers = nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


class Saved:
    """What the graph of one operation keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach() if tensor.requires_grad else tensor


@pytest.fixture
def collector_is_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left_over(call: Callable[[], Any]) -> tuple[int, int]:
    """How many tensors the graphs of a call saved, and how many of them are still there after it."""
    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        kept = Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        call()
    return len(saved), sum(kept() is not None for kept in saved)


MODELS = {"linear": linear, "convolutional": convolutional, "attention": Attention}
OPTIMISERS: dict[str, Callable[[nn.Module, ng.Likelihood], Any]] = {
    "KFAC": ng.KFAC,
    "KFAC, ekfac": lambda model, likelihood: ng.KFAC(model, likelihood, structure="ekfac"),
    "KFAC.paper": ng.KFAC.paper,
    "EigenAdam": ng.EigenAdam,
    "NaturalGradient": ng.NaturalGradient,
    "NaturalGradient with K-FAC": lambda model, likelihood: ng.NaturalGradient(
        model, likelihood, preconditioner="block_diagonal"
    ),
    "HessianFree": ng.HessianFree,
    "KrylovDescent": ng.KrylovDescent,
    "TONGA": ng.TONGA,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_step(optimiser: str, model: str, collector_is_off: None) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(7, 16), torch.randint(3, (7,))
    made = OPTIMISERS[optimiser](MODELS[model](), ng.Categorical())
    for _ in range(2):  # what is prepared once is prepared
        made.step(x, y)
    saved, left = left_over(lambda: made.step(x, y))
    assert saved > 0 and left == 0


@pytest.mark.parametrize("model", ["convolutional", "attention"])
@pytest.mark.parametrize("kind", ["Fisher", "Jacobian", "Hessian", "kronecker_fisher"])
def test_a_matrix(kind: str, model: str, collector_is_off: None) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(7, 16), torch.randint(3, (7,))
    net, likelihood = MODELS[model](), ng.Categorical()
    v = torch.ones(sum(p.numel() for p in net.parameters()), 2)
    uses: dict[str, Callable[[], Any]] = {
        "Fisher": lambda: ng.Fisher(net, likelihood, x) @ v,
        "Jacobian": lambda: ng.Jacobian(net, x) @ v,
        "Hessian": lambda: ng.Hessian(net, likelihood, x, y) @ v,
        "kronecker_fisher": lambda: ng.kronecker_fisher(net, likelihood, x),
    }
    saved, left = left_over(uses[kind])
    assert saved > 0 and left == 0
