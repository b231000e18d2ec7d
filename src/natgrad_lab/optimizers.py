"""The optimisers that race: a name, an update function, a batch size per update, and the settings that made them.

The settings are data: `recipes/baselines.json` (what the documented sweep over learning rate and batch size found for
the first-order methods), `recipes/kfac.json` and `recipes/family.json` (the rest of the natural-gradient family). A
baseline without an entry there uses the values of `BASELINE_DEFAULTS`.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

RECIPES = Path(__file__).parent / "recipes"

BASELINE_DEFAULTS: dict[str, dict[str, float]] = {
    "adam": {"lr": 1e-3, "batch_size": 250},
    "adamw": {"lr": 1e-3, "batch_size": 250, "weight_decay": 1e-2},
    "nesterov": {"lr": 3e-3, "mu_max": 0.99, "batch_size": 250},
    "sgd": {"lr": 1e-2, "batch_size": 250},
    "muon": {"lr": 1e-3, "batch_size": 250},
    "soap": {"lr": 3e-3, "weight_decay": 0.0, "batch_size": 250},
}


@dataclass
class Competitor:
    """An optimiser bound to its model, ready to be stepped.

    Attributes:
        name: The name in the registry.
        model: The model whose parameters it changes.
        optimizer: The optimiser object, for `state_dict` and `load_state_dict`.
        step: One update on a mini-batch (x, y); returns the loss before the update, a 0-d tensor.
        batch_size: Update number (from 1) to number of examples.
        settings: What to write beside its results: everything that was chosen, as plain values.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], Tensor]
    batch_size: Callable[[int], int]
    settings: dict[str, Any] = field(default_factory=dict)


def names() -> tuple[str, ...]:
    """The optimisers that `make` knows."""
    return tuple(_FACTORIES)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not in the list: what arrived, the nearest known name, all known names."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."


def check_name(name: str) -> str:
    """Return `name` if it is a known optimiser.

    Raises:
        ValueError: with the nearest known name and the whole list.
    """
    if name not in _FACTORIES:
        raise ValueError(unknown("optimizer", name, _FACTORIES))
    return name


def make(
    name: str, task: Any, model: nn.Module, *, seed: int = 0, settings: dict[str, Any] | None = None
) -> Competitor:
    """Make one competitor.

    Args:
        name: One of `names()`.
        task: The task (`natgrad_lab.data.Task`); its name chooses the recipe, its likelihood is the loss.
        model: The model to train; its parameters are the starting point.
        seed: For optimisers that sample (K-FAC's targets).
        settings: Overrides of the recipe's settings, one by one.

    Raises:
        ValueError: for an unknown name, or a recipe file that cannot be read.
    """
    return _FACTORIES[check_name(name)](name, task, model, seed, settings or {})


def baseline_settings(name: str, task_name: str) -> dict[str, Any]:
    """The tuned settings of a first-order method on a task, or the built-in ones where no sweep was made."""
    tuned = _read_recipe("baselines.json").get(task_name, {})
    return {**BASELINE_DEFAULTS[name], **(tuned.get(name, {}) if isinstance(tuned, dict) else {})}


def kfac_settings(name: str, task_name: str) -> dict[str, Any]:
    """`batch_size` and `arguments` of a K-FAC entry: the recipe's default, then the task's own, key by key."""
    return _layered("kfac.json", name, task_name)


def family_settings(name: str, task_name: str) -> dict[str, Any]:
    """The same for the rest of the natural-gradient family."""
    return _layered("family.json", name, task_name)


def _layered(file: str, name: str, task_name: str) -> dict[str, Any]:
    recipe = _read_recipe(file)
    merged: dict[str, Any] = {"batch_size": {"start": 500, "at": 500}, "arguments": {}}
    for layer in (recipe.get("default", {}).get(name, {}), recipe.get(task_name, {}).get(name, {})):
        for key in merged:
            merged[key] = {**merged[key], **layer.get(key, {})}
    return merged


def _read_recipe(file: str) -> dict[str, Any]:
    path = RECIPES / file
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the recipe {path} is not valid JSON ({error}); restore it from version control") from error


def gradient_step(
    model: nn.Module, likelihood: Any, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward, backward and update by a `torch.optim` optimiser; returns the loss before the update."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = likelihood.nll(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _first_order(name: str, task: Any, model: nn.Module, seed: int, overrides: dict[str, Any]) -> Competitor:
    settings = {**baseline_settings(name, task.name), **overrides}
    arguments = {key: value for key, value in settings.items() if key != "batch_size"}
    optimizer = _FIRST_ORDER[name](list(model.parameters()), **arguments)

    m = min(int(settings["batch_size"]), len(task.x_train))
    return Competitor(name, model, optimizer, gradient_step(model, task.likelihood, optimizer), lambda k: m, settings)


def _kfac(name: str, task: Any, model: nn.Module, seed: int, overrides: dict[str, Any]) -> Competitor:
    import natgrad as ng
    from natgrad.training import ExponentialBatchSize

    settings = kfac_settings(name, task.name)
    settings["arguments"] = {**settings["arguments"], **overrides}
    n = len(task.x_train)
    growth = {**settings["batch_size"], "final": n}
    growth["start"] = min(growth["start"], n)
    make_optimizer = ng.KFAC.paper if name == "kfac-paper" else ng.KFAC
    optimizer = make_optimizer(model, task.likelihood, seed=seed, **_objects(settings["arguments"], task))
    in_force = {key: repr(getattr(optimizer, key)) for key in _IN_FORCE if hasattr(optimizer, key)}

    def step(x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, optimizer.step(x, y))  # None only without inputs

    return Competitor(name, model, optimizer, step, ExponentialBatchSize(**growth), {**settings, "in force": in_force})


def _family(name: str, task: Any, model: nn.Module, seed: int, overrides: dict[str, Any]) -> Competitor:
    import natgrad as ng
    from natgrad.training import ExponentialBatchSize

    settings = family_settings(name, task.name)
    settings["arguments"] = {**settings["arguments"], **overrides}
    n = len(task.x_train)
    growth = {**settings["batch_size"], "final": min(settings["batch_size"].get("final", n), n)}
    growth["start"] = min(growth["start"], growth["final"])
    if name == "prong":
        optimizer, step = _whitened(task, model, settings["arguments"])
        return Competitor(name, model, optimizer, step, ExponentialBatchSize(**growth), settings)
    sampled = {} if name in _UNSEEDED else {"seed": seed}
    arguments = _objects(settings["arguments"], task)
    optimizer = getattr(ng, _FAMILY[name])(model, task.likelihood, **sampled, **arguments)
    return Competitor(name, model, optimizer, optimizer.step, ExponentialBatchSize(**growth), settings)


class _WithWhitening(torch.optim.SGD):
    """SGD on the parameters of a model that `natgrad.PRONG` rewrote; its state holds the transform's counters too."""

    def __init__(self, model: nn.Module, transform: dict[str, Any], **arguments: Any) -> None:
        import natgrad as ng

        self.prong = ng.PRONG(model, **transform)
        super().__init__(model.parameters(), fused=True, **arguments)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "prong": self.prong.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "prong"})
        self.prong.load_state_dict(state_dict["prong"])


def _whitened(
    task: Any, model: nn.Module, arguments: dict[str, Any]
) -> tuple[torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor]]:
    """SGD on a model with whitened layers; the arguments of `natgrad.PRONG` and of SGD together."""
    transform = {key: arguments[key] for key in ("every", "damping", "examples") if key in arguments}
    rest = {key: value for key, value in arguments.items() if key not in transform}
    optimizer = _WithWhitening(model, transform, **rest)
    return optimizer, gradient_step(model, task.likelihood, optimizer)


# What K-FAC chose where the recipe is silent: written beside the results, so that τ's and T's are always there.
_IN_FORCE = ("damping", "l2", "momentum", "subsets", "periods", "guard", "rescaling", "decay")


def _objects(arguments: dict[str, Any], task: Any) -> dict[str, Any]:
    """A recipe's plain values as arguments of `natgrad.KFAC` and its relatives.

    A mapping becomes the settings object that the argument takes; `"static_inputs": true` becomes the training inputs,
    a number so many of them, the name of a dtype that dtype.
    """
    from natgrad.optim import settings

    objects = {
        "damping": settings.Damping,
        "subsets": settings.Subsets,
        "periods": settings.Periods,
        "guard": settings.StepGuard,
    }
    made = {k: objects[k](**v) if k in objects and isinstance(v, dict) else v for k, v in arguments.items()}
    rows = made.pop("static_inputs", False)
    if rows:
        made["static_inputs"] = task.x_train if rows is True else task.x_train[:rows]
    if "rotation_dtype" in made:
        made["rotation_dtype"] = getattr(torch, str(made["rotation_dtype"]))
    return made


def _nesterov(parameters: list[nn.Parameter], **arguments: Any) -> torch.optim.Optimizer:
    from natgrad.optim.nesterov import NesterovSGD

    return NesterovSGD(parameters, **arguments)


def _muon(parameters: list[nn.Parameter], **arguments: Any) -> torch.optim.Optimizer:
    from natgrad_lab.rivals import MuonWithAdam

    return MuonWithAdam(parameters, **arguments)


def _soap(parameters: list[nn.Parameter], **arguments: Any) -> torch.optim.Optimizer:
    from natgrad_lab.rivals import soap

    return soap(parameters, **arguments)


# fused: one kernel over all parameters, the fastest form that PyTorch has, so that the baselines are not slowed by
# their loops.
_FIRST_ORDER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, **arguments: torch.optim.Adam(parameters, fused=True, **arguments),
    "nesterov": _nesterov,
    "adamw": lambda parameters, **arguments: torch.optim.AdamW(parameters, fused=True, **arguments),
    "sgd": lambda parameters, **arguments: torch.optim.SGD(parameters, fused=True, **arguments),
    "muon": _muon,
    "soap": _soap,
}

_FAMILY = {
    "hessian-free": "HessianFree",
    "krylov": "KrylovDescent",
    "natural-gradient": "NaturalGradient",
    "tonga": "TONGA",
    "acp": "ACP",
    "centered": "CenteredSGD",
    "prong": "PRONG",
    "eigen-adam": "EigenAdam",
    "eigen-adam-bf16": "EigenAdam",
}
_UNSEEDED = ("acp", "centered")  # nothing is sampled

_FACTORIES: dict[str, Callable[..., Competitor]] = {
    "kfac": _kfac,
    "kfac-paper": _kfac,
    "kfac-ekfac": _kfac,
    "kfac-tridiagonal": _kfac,
    **{name: _family for name in _FAMILY},
    **{name: _first_order for name in _FIRST_ORDER},
}
