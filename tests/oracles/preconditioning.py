"""A preconditioner without sampling and scaling, one step of a user's loop, and the dense twin of both."""

from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import ExactTikhonov

EVERY_STEP = ng.Renewal(inverses=1, statistics=1)


def mlp(*widths: int, activation: Any = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(d_in, d_out))
    return nn.Sequential(*layers).double()


def batch(n: int = 12, d: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def targets(likelihood: Any, n: int = 12, outputs: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(likelihood, ng.Categorical):
        return torch.randint(outputs, (n,), generator=generator)
    return torch.rand(n, outputs, generator=generator, dtype=torch.float64)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])


def plain(model: nn.Module, likelihood: Any, x: Any, y: Any) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(likelihood.nll(model(x), y), parameters)
    return nn.utils.parameters_to_vector(found)


def exact(model: nn.Module, likelihood: Any, **settings: Any) -> ng.Preconditioner:
    """No sampling and no scaling: everything can be compared with a dense twin."""
    given = {"expectation": "exact", "scaling": None, "periods": EVERY_STEP, "damping": 0.1, "form": ExactTikhonov()}
    return ng.Preconditioner(model, likelihood, **given | settings)


def fisher(model: nn.Module, likelihood: Any, x: Any, **settings: Any) -> Any:
    given = {"structure": "block_diagonal", "expectation": "exact", **settings}
    return ng.kronecker_fisher(model, likelihood, x, **given)


def train_once(model: nn.Module, pre: ng.Preconditioner, likelihood: Any, x: Any, y: Any) -> Tensor:
    model.zero_grad()
    z = model(x)
    loss = likelihood.nll(z, y)
    pre.observe(z)
    loss.backward()
    pre.step()
    return gradient(model)


def train(model: nn.Module, optimizer: ng.Preconditioned, likelihood: Any, x: Any, y: Any, steps: int) -> list[float]:
    """A user's loop on one batch; the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        z = model(x)
        optimizer.pre.observe(z)
        loss = likelihood.nll(z, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def damped_solve(F: Tensor, damping: float, g: Tensor) -> Tensor:
    return torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), g)
