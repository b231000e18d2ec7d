"""Whether K-FAC trains without anybody watching: three data sets, two activations, five seeds, one set of settings.

Each run has the same CPU-seconds. Wanted of every run: no NaN, no accepted update that raises the loss of its batch
by more than 5 %, at most 10 % of the updates rejected, and the plateau left: a training error below 0.9 times that of
the best constant prediction (the mean image). The loss of the batch after an update is evaluated outside the clock. An
update that fails is tried once more, shortened; it counts as rejected where that fails too, else as shortened.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import CASES, enter, load_all, positive, run_cpu, say
from benchmarks.report import cell, save, table
from natgrad_lab.optimizers import Competitor
from natgrad_lab.runner import Diverged, Runner

TASKS = ("curves", "digits", "mnist")
ACTIVATIONS = ("tanh", "sigmoid")
RISE, REJECTED, PLATEAU = 1.05, 0.10, 0.9


@dataclass
class Watch:
    """Stands between a runner and its optimiser, and compares the loss of a batch before and after each update."""

    competitor: Competitor
    task: Any
    batch: tuple[Tensor, Tensor] = field(init=False)
    before: float = math.nan
    worst_rise: float = 0.0  # loss after / loss before, of the accepted updates
    rejected: int = 0
    shortened: int = 0
    not_finite: int = 0

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update of the optimiser."""
        self.batch = x, y
        loss = self.competitor.step(x, y)
        self.before = float(loss)
        return loss

    def after(self, runner: Runner | None = None) -> bool:
        """Look at the last update; never ends the run."""
        model, stats = self.competitor.model, getattr(self.competitor.optimizer, "stats", {})
        with torch.no_grad():
            x, y = self.batch
            loss = float(self.task.likelihood.nll(model(x), y))
        self.not_finite += not math.isfinite(loss)
        if stats["accepted"]:
            self.worst_rise = max(self.worst_rise, loss / self.before)
        else:
            self.rejected += 1
        self.shortened = int(stats["shortened"])
        return False


def constant_error(task: Any) -> float:
    """Training error of the best constant prediction, the mean image."""
    return float((task.y_train - task.y_train.mean(dim=0)).square().sum(dtype=torch.float64)) / len(task.y_train)


def measure(task: Any, activation: str, seed: int, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run's record, and K-FAC's settings."""
    competitor = enter("kfac", task, seed=seed, activation=activation)
    watch = Watch(competitor, task)
    runner = Runner(replace(competitor, step=watch.step), task, seed=seed, subset=CASES)
    over = run_cpu(runner, seconds, watch.after)
    try:
        error = math.nan if over else runner.evaluate().train_error
    except Diverged as problem:
        error, over = math.nan, str(problem)
    record = {
        "task": task.name,
        "activation": activation,
        "seed": seed,
        "updates": runner.update,
        "not_finite": watch.not_finite + bool(over),
        "worst_rise": watch.worst_rise,
        "rejected": watch.rejected / max(runner.update, 1),
        "shortened": watch.shortened / max(runner.update, 1),
        "train_error": error,
        "of_constant": error / constant_error(task),
        "over": over,
    }
    return record | {"held": held(record)}, competitor.settings


def held(record: dict[str, Any]) -> bool:
    """Whether a run has all that is wanted."""
    return (
        record["not_finite"] == 0
        and record["worst_rise"] <= RISE
        and record["rejected"] <= REJECTED
        and record["of_constant"] < PLATEAU
    )


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line for each network and activation: the worst over the seeds."""
    header = [
        "network",
        "runs",
        "updates",
        "not finite",
        "loss after / before",
        "rejected",
        "shortened",
        "error / constant's",
        "held",
    ]
    lines = []
    for (task, activation), group in itertools.groupby(records, key=lambda r: (r["task"], r["activation"])):
        runs = list(group)
        errors = [run["of_constant"] for run in runs]
        lines.append(
            [
                f"{task}, {activation}",
                len(runs),
                min(run["updates"] for run in runs),
                sum(run["not_finite"] for run in runs),
                max(run["worst_rise"] for run in runs),
                f"{100 * max(run['rejected'] for run in runs):.1f} %",
                f"{100 * max(run['shortened'] for run in runs):.1f} %",
                max(errors) if all(map(math.isfinite, errors)) else math.nan,
                all(run["held"] for run in runs) or f"**{sum(run['held'] for run in runs)} of {len(runs)}**",
            ]
        )
    wanted = ["wanted", None, None, 0, f"≤ {cell(RISE)}", f"≤ {100 * REJECTED:.0f} %", None, f"< {cell(PLATEAU)}", None]
    return table(header, [*lines, wanted])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seeds", type=positive(int), default=5, help="so many, from 0 (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=positive(float), default=15.0, help="CPU-seconds of each run (default: %(default)g)"
    )


def main(options: argparse.Namespace) -> None:
    records, several = [], []
    for task in load_all(options.tasks):
        for activation, seed in itertools.product(ACTIVATIONS, range(options.seeds)):
            record, settings = measure(task, activation, seed, options.seconds)
            say("  " + ", ".join(f"{key} {cell(value)}" for key, value in record.items()))
            records.append(record)
            several.append(settings)
    same = all(settings["in force"] == several[0]["in force"] for settings in several)
    save(
        "robustness",
        "Without anybody watching",
        [
            f"K-FAC, {options.seconds:g} CPU-seconds for each run; the worst of {options.seeds} seeds (of the updates, "
            "the fewest). No run is repeated and none left out. Settings the same in all runs: " + cell(same) + ".",
            summary(records),
        ],
        {"runs": records, "same_settings": same},
        command=options.command,
        settings=several[0],
        folder=options.out,
    )
