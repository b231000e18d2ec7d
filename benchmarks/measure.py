"""What the measurements share: data, CPU clocks, runs of so many CPU-seconds, medians and ratios."""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from natgrad_lab import data, optimizers
from natgrad_lab.runner import Diverged, Runner

ROOT = Path(__file__).resolve().parents[1]
CASES = 10_000  # training and test cases of an evaluation


def load(task: str) -> data.Task:
    """A task's data in full.

    From the folder that NATGRAD_DATA names, else `../shared/data` beside the checkout, else the network.

    Raises:
        DataError: the data are not to be had, or the task is unknown.
    """
    beside = ROOT.parent / "shared" / "data"
    return data.load(task, folder=beside if "NATGRAD_DATA" not in os.environ and beside.is_dir() else None)


def load_all(names: str) -> list[data.Task]:
    """The tasks of a comma-separated list: what is missing is said before anything is measured."""
    return [load(name) for name in names.split(",")]


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a command-line option that must be above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = kind.__name__  # argparse names it
    return parse


def enter(name: str, task: Any, *, seed: int = 0, activation: str = "tanh") -> optimizers.Competitor:
    """An optimiser with the recipe's settings on a fresh model: the one constructor call of all measurements."""
    return optimizers.make(name, task, task.make_model(seed=seed, activation=activation), seed=seed)


def say(message: str) -> None:
    """One line of progress, on the error stream, so that the output can be kept as a table."""
    print(message, file=sys.stderr, flush=True)


def cpu_seconds(task: Callable[[], object]) -> float:
    """CPU-seconds of one call."""
    start = time.process_time()
    task()
    return time.process_time() - start


def in_turns(tasks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each task returns, so many times, in turn: a busy machine disturbs all alike."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(task())
    return found


def run_cpu(runner: Runner, until: float, after: Callable[[Runner], bool] = lambda runner: False) -> str:
    """Update until the runner's clock reads `until` CPU-seconds.

    Args:
        runner: What to step.
        until: CPU-seconds on the runner's own clock.
        after: Called after each update, outside the clock; true ends the run.

    Returns:
        "" or why the run is over: "stopped" by `after`, or what diverged.
    """
    try:
        while runner.clock.cpu_seconds < until:
            runner.clock.start()
            try:
                runner.advance()
            finally:
                runner.clock.stop()
            if after(runner):
                return "stopped"
    except Diverged as problem:
        return str(problem)
    return ""


def first_at(rows: Iterable[Mapping[str, Any]], error: float, key: str = "train_error") -> Mapping[str, Any] | None:
    """The first row whose error is at most `error`: nothing is interpolated."""
    return next((row for row in rows if row[key] <= error), None)


def median(values: Iterable[float | None]) -> float | None:
    """The median; a run that did not get there (None) counts as later than all others, so the median may be None."""
    known = [math.inf if v is None else v for v in values]
    middle = statistics.median(known) if known else math.inf
    return middle if math.isfinite(middle) else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b; None where one of them is missing or b is 0."""
    return None if a is None or b is None or b == 0 else a / b
