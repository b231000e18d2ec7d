"""Training runs of [THESIS, sec. 6.6]: one method with its settings, for a while of its own, watched at even times.

Time is what the updates themselves take: CPU-seconds on the CPU, so that other programs make no difference, else
seconds. Evaluation is not counted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.training import MeanOnlyBatchNorm, glorot_init_, he_init_
from natgrad_lab import labelled
from natgrad_lab.optimizers import gradient_step
from natgrad_lab.recipes.run import Run
from natgrad_lab.runner import EVALUATION_CHUNK, Batches, Clock

CLASSES = 10
UNITS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "mean-only": MeanOnlyBatchNorm}
DIVERGED = 3.0  # times the loss of the output 0

Step = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Task:
    """Images to restore (hidden layers that end in a code and go back), or to classify.

    Attributes:
        x, y: Training cases and targets.
        x_test, y_test: The test set.
        likelihood: Of the targets.
        sizes: Units from input to output.
        code: Which layer has linear units, besides the last one; None: none.
        worst: The loss of the output 0.
    """

    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    likelihood: ng.Gaussian | ng.Categorical
    sizes: list[int]
    code: int | None
    worst: float

    @torch.no_grad()
    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
        """The expected loss, E ‖f(x) − x‖² or the cross-entropy in nats, and the share of wrong classes (else 0).

        In evaluation mode, in chunks.
        """
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=x.device)
        for some, targets in zip(x.split(EVALUATION_CHUNK), y.split(EVALUATION_CHUNK), strict=True):
            z = model(some)
            if isinstance(self.likelihood, ng.Gaussian):
                total[0] += (z - targets).square().sum(dtype=torch.float64)
            else:
                total[0] += nn.functional.cross_entropy(z.double(), targets, reduction="sum")
                total[1] += (z.argmax(1) != targets).sum()
        model.train()
        loss, wrong = (total / len(x)).tolist()
        return loss, wrong


def load_task(run: Run) -> Task:
    """The task of a run: an autoencoder, or a classifier where the configuration says so."""
    c = run.configuration
    data = labelled.load(c["data"], run.data).take(c["cases"]).resized(c["side"]).to(device=run.device)
    x, x_test = data.x_train.float(), data.x_test.float()
    if c["classify"]:
        sizes = [x.shape[1], *c["hidden"], CLASSES]
        worst = math.log(CLASSES)
        return Task(x, data.y_train, x_test, data.y_test, ng.Categorical(), sizes, None, worst)
    sizes = [x.shape[1], *c["hidden"], x.shape[1]]
    code = min(range(len(sizes)), key=lambda i: sizes[i]) - 1
    return Task(x, x, x_test, x_test, ng.Gaussian(), sizes, code, x.square().sum(1).mean().item())


def network(task: Task, units: str, norm: str | None, init: float, seed: int) -> nn.Sequential:
    """Linear layers with these units, their inputs normalised where asked for; the output layer never is.

    Args:
        task: Sizes, and the layer whose units are linear.
        units: "tanh" or "relu".
        norm: "batch", "mean-only" or None. It replaces the bias of the layer.
        init: α of the weights: uniform with variance α / (n_in + n_out), for ReLU α / n_in [THESIS, sec. 2.4.2].
        seed: Of the weights.
    """
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(zip(task.sizes, task.sizes[1:], strict=False)):
        last = i == len(task.sizes) - 2
        layers.append(nn.utils.skip_init(nn.Linear, n_in, n_out, bias=norm is None or last))
        if norm is not None and not last:
            layers.append(NORMS[norm](n_out))
        if not last and i != task.code:
            layers.append(UNITS[units]())
    model = nn.Sequential(*layers)
    initialise = he_init_ if units == "relu" else glorot_init_
    initialise(model, init, "uniform", generator=torch.Generator().manual_seed(seed))
    return model.to(task.x)


def _sgd(model: nn.Module, task: Task, s: Mapping[str, float], every: int, seed: int) -> Step:
    return gradient_step(model, task.likelihood, torch.optim.SGD(model.parameters(), lr=s["lr"], fused=True))


def _centered(model: nn.Module, task: Task, s: Mapping[str, float], every: int, seed: int) -> Step:
    return ng.CenteredSGD(model, task.likelihood, lr=s["lr"]).step


def _kfac(model: nn.Module, task: Task, s: Mapping[str, float], every: int, seed: int) -> Step:
    """As the thesis describes it: statistics of one minibatch and their inverses, kept for N updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=s["lr"], fused=True)
    periods = ng.Renewal(inverses=every, statistics=every, early=(1,))
    pre = ng.Preconditioner(
        model, task.likelihood, damping=s["damping"], seed=seed, periods=periods, scaling=None, decay=0.0
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        z = model(x)
        loss = task.likelihood.nll(z, y)
        pre.observe(z)
        loss.backward()
        pre.step()
        optimizer.step()
        return loss.detach()

    return step


def _acp(model: nn.Module, task: Task, s: Mapping[str, float], every: int, seed: int) -> Step:
    alpha = s.get("alpha", "max")
    return ng.ACP(model, task.likelihood, lr=s["lr"], alpha=alpha, damping=s["damping"], every=every).step


OPTIMIZERS: dict[str, Callable[..., Step]] = {"sgd": _sgd, "centered": _centered, "kfac": _kfac, "acp": _acp}


def train(
    run: Run,
    task: Task,
    label: str,
    method: Mapping[str, Any],
    settings: Mapping[str, float],
    *,
    seconds: float,
    marks: int,
) -> dict[str, Any]:
    """Train from the start of this run's seed.

    Args:
        run: Of the recipe: batch size, period, units, cases that are watched.
        task: What to train on.
        label: What the progress bar says.
        method: "optimizer", one of `OPTIMIZERS`, and "norm", as of `network`.
        settings: "init", of `network`; "lr", and what else the optimiser takes.
        seconds: How long the updates may take together.
        marks: Evaluations at even times, besides the one at the start.

    Returns:
        The columns of the evaluations (`seconds`, `update`, `train`, `test`, `test_wrong`) and `end`: "finished" or
        "diverged", which the last evaluation then shows.
    """
    c = run.configuration
    model = network(task, c["units"], method["norm"], settings["init"], run.seed)
    step = OPTIMIZERS[method["optimizer"]](model, task, settings, c["every"], run.seed)
    batches, clock = Batches(len(task.x), seed=run.seed), Clock(run.device)
    x, y = task.x[: c["watched"]], task.y[: c["watched"]]
    found: dict[str, list[float]] = {key: [] for key in ("seconds", "update", "train", "test", "test_wrong")}
    update, end = 0, "finished"
    with run.bar(label, marks) as advance:
        for mark in range(marks + 1):
            while (now := _read(clock)) < seconds * mark / marks:
                clock.start()
                rows = batches.next(c["batch"])
                step(task.x[rows], task.y[rows])
                update += 1
                clock.stop()
            test, wrong = task.loss(model, task.x_test, task.y_test)
            values = (now, update, task.loss(model, x, y)[0], test, wrong)
            for column, value in zip(found.values(), values, strict=True):
                column.append(value)
            if not found["train"][-1] <= DIVERGED * task.worst:
                end = "diverged"
                break
            if mark:
                advance()
    return {"settings": dict(settings), "end": end, **found}


def _read(clock: Clock) -> float:
    return clock.seconds if clock.device.type == "cuda" else clock.cpu_seconds
