"""Training runs of [NATGRAD, secs. 5, 8.5 to 8.7]: metrics of several kinds of inputs; killed, they go on."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.optim.newton import KrylovSolver
from natgrad_lab import checkpoint
from natgrad_lab.recipes.run import Run
from natgrad_lab.runner import Batches
from natgrad_lab.signals import between_updates

FORMAT = "natgrad-comparison-1"
SAVE_EVERY = 60.0  # seconds between checkpoints
CHUNK = 1000  # cases of an evaluation at a time
METRICS = ("none", "same", "different", "unlabelled", "joined", "covariance")


@dataclass(frozen=True)
class Problem:
    """A classification problem.

    Attributes:
        make_model: From a seed to a new model on the right device.
        x_train, y_train, x_test, y_test: Inputs and int64 classes.
        unlabelled: Inputs whose classes nobody sees, for the metric; None where there are none.
    """

    make_model: Callable[[int], nn.Module]
    x_train: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    unlabelled: Tensor | None = field(default=None, repr=False)


class Training:
    """One method on one problem.

    Args:
        problem: What to train on.
        method: "metric", one of METRICS; "batch" and "metric batch", numbers of examples; "updates"; "lr"; "damping";
            "adapts", whether the Levenberg-Marquardt rule moves it; "decay", None or [after, scale] of
            `natgrad.training.HyperbolicDecay`; "iterations" of the solver; "guard", whether a step that raises the loss
            of its batch is undone (False).
        seed: Of initial weights and batches.

    Attributes:
        update: Updates done.
        columns: The evaluations: "update", "train", the mean nll of all training cases, and "test", errors in percent.
    """

    def __init__(self, problem: Problem, method: Mapping[str, Any], seed: int) -> None:
        self.problem, self.method = problem, method
        self.model = problem.make_model(seed)
        self.optimizer: Any = _optimizer(self.model, method, seed)
        self.batches = Batches(len(problem.x_train), seed)
        other = problem.unlabelled if method["metric"] in ("unlabelled", "joined") else problem.x_train
        if other is None:
            raise ValueError(f"metric {method['metric']!r}: this problem has no unlabelled inputs")
        self.metric_source = other
        self.metric_batches = Batches(len(other), seed + 1)
        decay = method.get("decay")
        self.factor = ng.training.HyperbolicDecay(*decay) if decay else lambda t: 1.0
        self.update = 0
        self.columns: dict[str, list[float]] = {"update": [], "train": [], "test": []}

    def advance(self) -> None:
        """One update."""
        problem, method, metric = self.problem, self.method, self.method["metric"]
        for group in self.optimizer.param_groups:
            group["lr"] = method["lr"] * self.factor(self.update)
        rows = self.batches.next(method["batch"])
        x, y = problem.x_train[rows], problem.y_train[rows]
        if metric == "none":
            self.optimizer.zero_grad()
            ng.Categorical().nll(self.model(x), y).backward()
            self.optimizer.step()
        elif metric in ("same", "covariance"):
            self.optimizer.step(x, y)
        else:
            u = self.metric_source[self.metric_batches.next(method["metric batch"])]
            self.optimizer.step(x, y, metric_inputs=u, join=metric == "joined")
        self.update += 1

    def evaluate(self) -> bool:
        """Note the errors now; whether they are finite."""
        problem = self.problem
        train, _ = evaluated(self.model, problem.x_train, problem.y_train)
        _, test = evaluated(self.model, problem.x_test, problem.y_test)
        for name, value in (("update", self.update), ("train", train), ("test", test)):
            self.columns[name].append(value)
        return math.isfinite(train)

    def state_dict(self) -> dict[str, Any]:
        """All that an uninterrupted run would carry into its next update."""
        parts = ("model", "optimizer", "batches", "metric_batches")
        return {name: getattr(self, name).state_dict() for name in parts} | {
            "update": self.update,
            "columns": self.columns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        for name in ("model", "optimizer", "batches", "metric_batches"):
            getattr(self, name).load_state_dict(state[name])
        self.update, self.columns = state["update"], state["columns"]


def train(run: Run, problem: Problem, name: str, method: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; returns the columns, and "end" in a word.

    Raises:
        KeyboardInterrupt: at Ctrl-C, after a checkpoint.
    """
    folder = run.place(name.replace(",", "").replace(" ", "-"))
    training = Training(problem, method, seed)
    if (folder / checkpoint.NAME).exists() or (folder / checkpoint.PREVIOUS).exists():
        training.load_state_dict(checkpoint.load(folder))
    updates, every = method["updates"], method["every"]
    end = "finished"
    with run.bar(name, updates) as advance, between_updates() as interrupted:
        for _ in range(training.update):
            advance()
        saved = time.monotonic()
        while True:
            due = training.update % every == 0 or training.update == updates
            if due and training.columns["update"][-1:] != [training.update] and not training.evaluate():
                end = "diverged"
                break
            if training.update == updates:
                break
            try:
                interrupted()
            except KeyboardInterrupt:
                _save(folder, training)
                raise
            training.advance()
            advance()
            if time.monotonic() - saved >= SAVE_EVERY:
                _save(folder, training)
                saved = time.monotonic()
    return {"end": end, **training.columns}


def glorot_(model: nn.Module, seed: int) -> nn.Module:
    """Weights uniform within ±√(6 / (fan in + fan out)), biases 0; PyTorch's global random stream is left alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    return model


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean nll, and the share of wrong answers in percent."""
    nll, wrong = 0.0, 0
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        z = model(x[rows])
        nll += float(ng.Categorical().nll(z, y[rows], count=1))
        wrong += int((z.argmax(-1) != y[rows]).sum())
    return nll / len(x), 100.0 * wrong / len(x)


def _optimizer(model: nn.Module, method: Mapping[str, Any], seed: int) -> torch.optim.Optimizer:
    metric, lr = method["metric"], method["lr"]
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
    if metric == "none":
        return torch.optim.SGD(model.parameters(), lr=lr)
    if metric == "covariance":
        return ng.TONGA(model, ng.Categorical(), lr=lr, damping=method["damping"], momentum=0.0, seed=seed)
    return ng.NaturalGradient(
        model,
        ng.Categorical(),
        solver=KrylovSolver(max_iters=method["iterations"]),
        lr=lr,
        damping=method["damping"],
        rule=ng.LevenbergMarquardt(every=1, decay=2 / 3) if method["adapts"] else None,
        ratio="quadratic",
        guard=method.get("guard", False),
        seed=seed,
    )


def _save(folder: Path, training: Training) -> None:
    checkpoint.save(folder, {"format": FORMAT, **training.state_dict()})
