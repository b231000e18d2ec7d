"""A small classification task that is badly conditioned, and a user's training loop."""

from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng

LIKELIHOOD = ng.Categorical()


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers += [nn.ReLU(inplace=True)] if i else []
        layers.append(nn.Linear(d_in, d_out))
    return nn.Sequential(*layers).to(dtype)


def blobs(n: int = 1200, d: int = 20, classes: int = 8, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Classes that a badly conditioned mixing of the inputs makes slow to tell apart for gradient descent."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    y = torch.randint(classes, (n,), generator=generator)
    x = centres[y] + 0.7 * torch.randn(n, d, generator=generator)
    mixing = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1)))[0]
    return x @ mixing * torch.logspace(0.5, -1.5, d), y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train(
    model: nn.Module, optimizer: Any, pre: ng.Preconditioner | None, epochs: int, scheduler: Any = None, parts: int = 1
) -> list[float]:
    """A user's loop; the test accuracy after every epoch."""
    x, y = blobs()
    x_test, y_test = blobs(600, seed=5)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            for part in rows.chunk(parts):
                z = model(x[part])
                loss = LIKELIHOOD.nll(z, y[part]) / parts
                if pre is not None:
                    pre.observe(z)
                loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        found.append(accuracy(model, x_test, y_test))
    return found
