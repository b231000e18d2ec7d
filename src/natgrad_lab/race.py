"""A race: several optimisers, from the same initial parameters, on the same data, for the same seconds.

They take turns: each runs up to the next evaluation time of its own clock, is evaluated, and hands over. A noisy
machine then disturbs all of them alike, and an interrupted race still compares equals. Evaluation is outside every
clock.
"""

import copy
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from natgrad_lab import optimizers
from natgrad_lab.memory import peak_bytes
from natgrad_lab.optimizers import Competitor
from natgrad_lab.records import End, Evaluation, JsonLines, Race, environment
from natgrad_lab.runner import SUBSET, XI, Diverged, Runner
from natgrad_lab.signals import between_updates

RECORDS = "records.jsonl"

TARGETS: dict[str, tuple[float, ...]] = {
    "curves": (30.0, 20.0, 15.0, 10.0, 8.0, 5.0, 3.0, 1.5),
    "mnist": (30.0, 20.0, 15.0, 10.0, 8.0, 6.0, 4.0, 3.0),
}


class Observer(Protocol):
    """Who watches a race. `updated` is called inside the clock: it must be quick."""

    def updated(self, runner: Runner) -> None:
        """One more update was made."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation was recorded."""

    def ended(self, end: End) -> None:
        """An optimiser's run is over."""


class Silent:
    """An observer that looks away."""

    def updated(self, runner: Runner) -> None:
        """Nothing."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Nothing."""

    def ended(self, end: End) -> None:
        """Nothing."""


Make = Callable[..., Competitor]


def run(
    task: Any,
    names: Sequence[str],
    *,
    seconds: float,
    out: Path,
    seed: int = 0,
    activation: str = "tanh",
    evaluations: int = 40,
    subset: int = SUBSET,
    observer: Observer | None = None,
    make: Make = optimizers.make,
) -> Race:
    """Race optimisers and record everything in `out/records.jsonl` while it goes on.

    Args:
        task: The task (`natgrad_lab.data.Task`).
        names: The optimisers, in starting order.
        seconds: Wall seconds of updates for each.
        out: An existing folder.
        seed: Of the initial parameters, the batch order and the optimisers' own streams.
        activation: Of the model's hidden units.
        evaluations: How often each is evaluated.
        subset: Cases of an evaluation during the race.
        observer: Who watches.
        make: Makes a competitor; `optimizers.make` unless a test brings its own.

    A competitor whose loss is no longer finite is marked and stops; so is one whose update raises an exception. Ctrl-C
    ends the race between two updates and keeps what was measured.
    """
    observer = observer or Silent()
    initial = task.make_model(seed=seed, activation=activation).to(task.x_train.device)

    def enter(name: str) -> Competitor:
        return make(name, task, copy.deepcopy(initial), seed=seed)

    competitors = [enter(name) for name in names]
    runners = [Runner(c, task, seed=seed, subset=subset) for c in competitors]
    path = out / RECORDS
    _keep_earlier(path)
    lines = JsonLines(path)
    ends: dict[str, End] = {}

    def end(
        runner: Runner,
        reason: str,
        message: str = "",
        errors: tuple[float, float] = (math.nan, math.nan),
        peak: int | None = None,
    ) -> None:
        done = End(
            runner.competitor.name,
            reason,
            message,
            runner.update,
            runner.examples,
            runner.clock.seconds,
            runner.clock.cpu_seconds,
            *errors,
            peak,
        )
        ends[done.optimizer] = done
        lines.write("end", done)
        observer.ended(done)

    had_their_time = False
    try:
        lines.write("race", _header(task, initial, competitors, seconds, seed, activation, subset))
        with between_updates() as interrupted:

            def after(runner: Runner) -> None:
                observer.updated(runner)
                interrupted()

            for moment in [0.0, *evaluation_times(seconds, evaluations)]:
                for runner in runners:
                    if runner.competitor.name not in ends:
                        _turn(runner, moment, seconds, after, lines, observer, end)
                        interrupted()
            had_their_time = True
            for runner in runners:
                if runner.competitor.name not in ends:
                    end(runner, "finished", errors=runner.final_errors(), peak=_peak(enter, runner))
                    interrupted()
    except KeyboardInterrupt:
        for runner in runners:
            if runner.competitor.name not in ends:
                end(runner, *(("finished", "") if had_their_time else ("interrupted", "stopped by Ctrl-C")))
    finally:
        lines.close()
    return Race.read(path)


def _turn(
    runner: Runner,
    moment: float,
    seconds: float,
    after: Callable[[Runner], None],
    lines: JsonLines,
    observer: Observer,
    end: Callable[..., None],
) -> None:
    """Let one optimiser run up to `moment` and evaluate it, if it made an update; end it if it diverges or raises."""
    try:
        made = runner.run_until(moment, last=moment >= seconds, after=after) if moment > 0.0 else 0
        if made or moment == 0.0:
            evaluation = runner.evaluate()
            lines.write("evaluation", evaluation)
            observer.evaluated(evaluation)
    except Diverged as problem:
        end(runner, "diverged", str(problem))
    except Exception as problem:
        lines.write("traceback", {"optimizer": runner.competitor.name, "text": traceback.format_exc()})
        end(runner, "failed", f"{type(problem).__name__}: {problem}".splitlines()[0])


def evaluation_times(seconds: float, count: int) -> list[float]:
    """About `count` moments up to `seconds`.

    Half of them evenly spaced in the logarithm from 1 % on, to draw a curve on a logarithmic axis; half evenly spaced,
    to say when an error was reached.
    """
    if count == 1:
        return [seconds]
    geometric = [seconds * 0.01 ** (1 - i / (count // 2 - 1)) for i in range(count // 2)] if count >= 4 else []
    even = [seconds * (i + 1) / (count - len(geometric)) for i in range(count - len(geometric))]
    return sorted({round(t, 9) for t in [*geometric, *even[:-1], seconds]})


def targets(race: Race) -> list[float]:
    """Errors whose first crossing the table shows: those of the task that somebody reached, largest first."""
    best = min((e.train_error for t in race.traces.values() for e in t.evaluations), default=math.inf)
    start = max((t.evaluations[0].train_error for t in race.traces.values() if t.evaluations), default=math.inf)
    known = TARGETS.get(race.configuration["task"]) or [
        digit * 10.0**power for power in range(4, -4, -1) for digit in (8, 5, 3, 2, 1.5, 1)
    ]
    reached = [error for error in known if best <= error < start]
    return reached[-6:]


def _header(
    task: Any, model: nn.Module, competitors: list[Competitor], seconds: float, seed: int, activation: str, subset: int
) -> dict[str, Any]:
    return {
        "format": 1,
        "task": task.name,
        "description": getattr(task, "description", ""),
        "train_cases": len(task.x_train),
        "test_cases": len(task.x_test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "activation": activation,
        "seconds": seconds,
        "seed": seed,
        "averaging": XI,
        "evaluation_cases": subset,
        "device": str(task.x_train.device),
        "dtype": str(task.x_train.dtype).removeprefix("torch."),
        "optimizers": {c.name: c.settings for c in competitors},
        "environment": environment(),
    }


def _peak(enter: Callable[[str], Competitor], runner: Runner) -> int | None:
    """Peak tensor memory of two updates of a fresh copy, model and state included, at the run's last batch size."""
    task = runner.task

    def two_updates() -> Competitor:
        fresh = enter(runner.competitor.name)
        for _ in range(2):
            x = task.x_train[: runner.batch_size].clone()
            fresh.step(x, x if task.y_train is task.x_train else task.y_train[: runner.batch_size].clone())
        return fresh

    try:
        return peak_bytes(two_updates, task.x_train.device)
    except RuntimeError:  # a measurement that fails must not cost the race its result
        return None


def _keep_earlier(path: Path) -> None:
    """Move the records of an earlier race in the same folder aside instead of mixing with or losing them."""
    if path.exists():
        number = 1
        while (earlier := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(earlier)
