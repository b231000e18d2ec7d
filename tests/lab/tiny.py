"""A task small enough to race in a test: 16 pixels, 120 cases, two hidden units, a likelihood of its own."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from natgrad_lab.optimizers import Competitor


class PlainBernoulli:
    def nll(self, z: Tensor, y: Tensor, **arguments: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)

    def to_mean(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)


@dataclass
class TinyTask:
    x_train: Tensor
    x_test: Tensor
    name: str = "tiny"
    description: str = "Sixteen pixels with two causes."
    likelihood: Any = field(default_factory=PlainBernoulli)

    @property
    def y_train(self) -> Tensor:
        return self.x_train

    @property
    def y_test(self) -> Tensor:
        return self.x_test

    def make_model(self, seed: int = 0, activation: str = "tanh") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = nn.Tanh() if activation == "tanh" else nn.Sigmoid()
            return nn.Sequential(nn.Linear(16, 6), hidden, nn.Linear(6, 16))


def tiny_task(train: int = 90, test: int = 30) -> TinyTask:
    generator = torch.Generator().manual_seed(7)
    causes = torch.randn(train + test, 2, generator=generator)
    pixels = torch.sigmoid(2 * causes @ torch.randn(2, 16, generator=generator))
    return TinyTask(pixels[:train], pixels[train:])


def load_tiny(*arguments: Any) -> TinyTask:
    """In place of a command's `load`: the tiny task under the name of CURVES."""
    task = tiny_task()
    task.name = "curves"
    return task


def competitor(name: str, task: Any, model: nn.Module, step: Any, batch_size: int = 10) -> Competitor:
    """A competitor whose update is `step(x, y)`, for tests that want it to misbehave."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Competitor(name, model, optimizer, step, lambda k: batch_size, {"made by": "a test"})
