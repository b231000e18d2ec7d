"""The reference: the same model, optimiser and scheduler in a plain loop."""

from dataclasses import dataclass
from typing import Any

import torch
from oracles.classifier import LIKELIHOOD, blobs, mlp
from torch import Tensor, nn

import natgrad as ng

STEPS = 24
ACCUMULATE = 3
BATCH = 60


@dataclass
class Parts:
    """What a loop turns."""

    model: Any
    pre: ng.Preconditioner
    optimizer: Any
    scheduler: Any


def make(model: nn.Module | None = None, steps: int = STEPS) -> Parts:
    """A fresh set, always the same."""
    model = mlp(20, 32, 8) if model is None else model
    pre = ng.Preconditioner(model, LIKELIHOOD, seed=3)
    optimizer = ng.Preconditioned(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01), pre)
    return Parts(model, pre, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * steps))


def batches(accumulate: int = 1, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of `steps` steps: a few epochs in fixed order."""
    x, y = blobs()
    rows = torch.arange(steps * BATCH) % len(x)
    parts = rows.split(BATCH // accumulate)
    return [(x[part], y[part]) for part in parts]


def plain(accumulate: int = 1, data: list[tuple[Tensor, Tensor]] | None = None) -> Parts:
    """Trained for `STEPS` steps of `accumulate` micro-batches each."""
    parts = make()
    for i, (x, y) in enumerate(batches(accumulate) if data is None else data, start=1):
        z = parts.model(x)
        parts.pre.observe(z)
        (LIKELIHOOD.nll(z, y) / accumulate).backward()
        if i % accumulate == 0:
            parts.optimizer.step()
            parts.scheduler.step()
            parts.optimizer.zero_grad()
    return parts


def equal_states(found: Any, expected: Any, path: str = "state") -> None:
    """Equal to the last bit: tensors, numbers, and what holds them."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            equal_states(found[key], value, f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, value in enumerate(expected):
            equal_states(found[i], value, f"{path}[{i}]")
    else:
        assert found == expected, path
