"""Who takes part in the races: an optimiser behind one call, and the learning rates that its sweep tries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.race_tasks import RaceTask
from natgrad.optim.settings import Periods, Subsets

Step = Callable[[Tensor, Tensor], Any]


@dataclass
class Racer:
    """An optimiser bound to its model.

    Attributes:
        step: one update on a batch.
        groups: whose ``lr`` the schedule multiplies.
        state: what is kept from step to step, as `state_dict`s.
    """

    step: Step
    groups: Sequence[dict[str, Any]]
    state: Callable[[], list[Any]]
    rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.rates = [group["lr"] for group in self.groups]

    def set_rate(self, share: float) -> None:
        """Multiply the learning rates by a share."""
        for group, lr in zip(self.groups, self.rates, strict=True):
            group["lr"] = lr * share


Maker = Callable[..., Racer]


def _loop(model: nn.Module, task: RaceTask, optimizers: Sequence[Any], pre: ng.Preconditioner | None = None) -> Racer:
    """An ordinary training step."""

    def step(x: Tensor, y: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        z = model(x)
        loss = task.likelihood.nll(z, y)
        if pre is not None:
            pre.observe(z)
        loss.backward()
        if pre is not None:
            pre.step()
        for optimizer in optimizers:
            optimizer.step()

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    kept = [*optimizers, *([pre] if pre is not None else [])]
    return Racer(step, groups, lambda: [one.state_dict() for one in kept])


def _inner(model: nn.Module, name: str, lr: float, weight_decay: float, **settings: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        how = {"momentum": 0.9, **settings}
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True, **how)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True, **settings)


def adamw(model: nn.Module, task: RaceTask, lr: float, seed: int, **settings: Any) -> Racer:
    """torch's AdamW."""
    return _loop(model, task, [_inner(model, "adamw", lr, **settings)])


def sgd(model: nn.Module, task: RaceTask, lr: float, seed: int, **settings: Any) -> Racer:
    """torch's SGD with momentum."""
    return _loop(model, task, [_inner(model, "sgd", lr, **settings)])


def preconditioned(
    model: nn.Module,
    task: RaceTask,
    lr: float,
    seed: int,
    inner: dict[str, Any],
    periods: dict[str, Any],
    scaling: dict[str, Any] | None = None,
    **settings: Any,
) -> Racer:
    """natgrad's `Preconditioner` in front of one of torch's optimisers."""
    inner = dict(inner)
    scalings: dict[str, Callable[..., Any]] = {"kl": ng.KLClip, "graft": ng.Grafting}
    scale = {} if scaling is None else {"scaling": scalings[scaling["kind"]](*scaling["arguments"])}
    pre = ng.Preconditioner(model, task.likelihood, seed=seed, periods=ng.Renewal(**periods), **scale, **settings)
    return _loop(model, task, [_inner(model, inner.pop("name"), lr, **inner)], pre)


def eigen_adam(
    model: nn.Module,
    task: RaceTask,
    lr: float,
    seed: int,
    periods: dict[str, Any],
    subsets: Sequence[float],
    **settings: Any,
) -> Racer:
    """natgrad's `EigenAdam`, which evaluates the model itself."""
    optimizer = ng.EigenAdam(
        model,
        task.likelihood,
        lr=lr,
        seed=seed,
        periods=Periods(**periods),
        subsets=Subsets(*subsets),
        **settings,
    )
    return Racer(optimizer.step, optimizer.param_groups, lambda: [optimizer.state_dict()])


def hidden(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon is made for: of linear layers and convolutions, the last layer excepted."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [layer.weight for layer in layers[:-1]]


def muon(model: nn.Module, task: RaceTask, lr: float, seed: int, weight_decay: float, **settings: Any) -> Racer:
    """torch's Muon on the hidden weights, as matrices [out, rest]; AdamW with the same learning rate on the others."""
    weights = hidden(model)
    taken = {id(p) for p in weights}
    matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in weights]  # the same memory
    matrix = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **settings)
    others = [p for p in model.parameters() if id(p) not in taken]
    rest = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True)

    def share_gradients(*_: Any) -> None:
        for p, own in zip(weights, matrices, strict=True):
            own.grad, p.grad = None if p.grad is None else p.grad.view(len(p), -1), None

    matrix.register_step_pre_hook(share_gradients)
    return _loop(model, task, [matrix, rest])


def soap(model: nn.Module, task: RaceTask, lr: float, seed: int, **settings: Any) -> Racer:
    """SOAP of the package pytorch_optimizer."""
    from natgrad_lab import rivals

    return _loop(model, task, [rivals.soap(model.parameters(), lr=lr, **settings)])


@dataclass(frozen=True)
class Entry:
    """A contestant of one race.

    Attributes:
        title: of its row.
        make: from model, task, learning rate and seed, and the settings.
        lr: the learning rate that the sweep tries first.
        settings: plain values, the same in the sweep and in the race.
    """

    title: str
    make: Maker
    lr: float
    settings: dict[str, Any]


BASELINE = "adamw"
OURS = ("preconditioned", "eigen-adam")
RENEWAL = {"inverses": 20, "statistics": 10, "rows": 0.25}


def _entries(decay: float, coupled: float, inner: dict[str, Any]) -> dict[str, Entry]:
    decoupled = {"weight_decay": decay}
    bases = {"periods": {"inverses": 10, "statistics": 5, "early": [1, 3, 6]}, "subsets": [0.25, 0.25], "decay": 0.8}
    kfac = f"natgrad: Preconditioner, {'SGD' if inner['name'] == 'sgd' else 'AdamW'} inside"
    return {
        BASELINE: Entry("AdamW", adamw, 1e-2, decoupled),
        "sgd": Entry("SGD, momentum 0.9", sgd, 0.1, {"weight_decay": coupled}),
        "preconditioned": Entry(
            kfac, preconditioned, 0.3 if inner["name"] == "sgd" else 0.03, {"inner": inner, "periods": RENEWAL}
        ),
        "eigen-adam": Entry("natgrad: EigenAdam", eigen_adam, 3e-2, {**decoupled, **bases, "width": 64}),
        "muon": Entry("torch's Muon", muon, 1e-2, decoupled),
        "soap": Entry("SOAP (pytorch_optimizer)", soap, 1e-2, decoupled),
    }


ENTRIES: dict[str, dict[str, Entry]] = {
    "transformer": {k: v for k, v in _entries(0.1, 0.0, {"name": "adamw", "weight_decay": 0.1}).items() if k != "sgd"},
    "cnn": _entries(0.05, 5e-4, {"name": "sgd", "weight_decay": 5e-4}),
}
