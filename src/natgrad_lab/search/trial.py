"""One trial of a search: an optimiser with sampled settings, trained for a while, and the error that it reached.

`Workers` runs trials in other processes. Only the process that made it talks to the storage.
"""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad_lab.search.spaces import settings_of


@dataclass(frozen=True)
class Budget:
    """What every trial gets: seconds of updates, or a number of updates; and what it starts from."""

    optimizer: str
    seconds: float | None
    updates: int | None
    seed: int
    activation: str


def train(task: Any, budget: Budget, values: dict[str, Any], check: Callable[[], None] | None = None) -> dict[str, Any]:
    """Train from the start of the search and evaluate.

    Args:
        task: The task (`natgrad_lab.data.Task`).
        budget: What the trial gets.
        values: Sampled values by the names of the search space.
        check: Called between updates; may raise KeyboardInterrupt.

    Returns:
        `error`: the training error (the better of iterate and running average), NaN where training diverged or
        raised; `test_error`, `updates`, `seconds`; `failure`: what happened, or "".
    """
    from natgrad_lab import optimizers
    from natgrad_lab.runner import Diverged, Runner

    model = task.make_model(seed=budget.seed, activation=budget.activation).to(task.x_train.device)
    found: dict[str, Any] = {"error": float("nan"), "test_error": float("nan"), "failure": ""}
    runner = None
    try:
        made = optimizers.make(budget.optimizer, task, model, seed=budget.seed, settings=settings_of(values))
        runner = Runner(made, task, seed=budget.seed)
        _advance(runner, budget, check)
        evaluation = runner.evaluate()
        found |= {"error": evaluation.train_error, "test_error": evaluation.test_error}
    except Diverged as problem:
        found["failure"] = f"diverged: {problem}"
    except Exception as problem:  # settings that an optimiser refuses, a matrix that cannot be inverted, no memory
        found["failure"] = " ".join(f"{type(problem).__name__}: {problem}".split())[:500]
    return found | {"updates": runner.update if runner else 0, "seconds": runner.clock.seconds if runner else 0.0}


def _advance(runner: Any, budget: Budget, check: Callable[[], None] | None) -> None:
    def after(runner: Any) -> None:
        if check is not None:
            check()

    if budget.seconds is not None:
        runner.run_until(budget.seconds, last=True, after=after)
        return
    runner.clock.start()
    try:
        for _ in range(budget.updates or 0):
            runner.advance()
            after(runner)
    finally:
        runner.clock.stop()


class Workers:
    """Processes that train one trial each, with one thread, on data that each loads once."""

    def __init__(self, jobs: int, task: str, data: Path | None, device: str) -> None:
        before = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")  # a fork would copy threads of PyTorch half-way
        self._pool = ProcessPoolExecutor(jobs, context, _start, (task, data, device))
        self._before = before

    def submit(self, budget: Budget, values: dict[str, Any]) -> Future[dict[str, Any]]:
        """Start a trial."""
        return self._pool.submit(_train, budget, values)

    def stop(self) -> None:
        """End all processes, whatever they are doing."""
        for child in set(multiprocessing.active_children()) - self._before:
            child.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


_task: Any = None  # of a worker process


def _start(task: str, data: Path | None, device: str) -> None:
    import torch
    from rich.console import Console

    from natgrad_lab.arguments import load

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    global _task
    _task = load(task, data, device, Console(quiet=True))


def _train(budget: Budget, values: dict[str, Any]) -> dict[str, Any]:
    return train(_task, budget, values)
