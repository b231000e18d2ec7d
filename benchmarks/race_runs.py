"""Runs of the races: contestants in turns, a line of JSON for each that is over, so that a race can go on later."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import say
from benchmarks.race_contestants import ENTRIES, Racer
from benchmarks.race_tasks import RaceTask, schedule
from natgrad_lab.memory import peak_bytes

TURN = 5  # steps at a time
EVALUATIONS = 40  # in as many steps as the baseline takes; the first ones are left out
FROM = 0.3


@dataclass(frozen=True)
class Trial:
    """What makes a run: a contestant, its learning rate, its number of steps and the seed."""

    name: str
    lr: float
    steps: int
    seed: int


def make(task: RaceTask, trial: Trial) -> tuple[torch.nn.Module, Racer]:
    """A fresh model and its optimiser."""
    entry = ENTRIES[task.name][trial.name]
    model = task.make_model(trial.seed)
    return model, entry.make(model, task, trial.lr, trial.seed, **entry.settings)


def steps_of(task: RaceTask, trial: Trial) -> Iterator[dict[str, Any] | None]:
    """Train, None after every turn, and in the end the record."""
    model, racer = make(task, trial)
    batches = task.batches(trial.seed)
    every = max(1, task.steps // EVALUATIONS)
    seconds, trace = 0.0, []
    for step in range(1, trial.steps + 1):
        start = time.process_time()
        x, y = next(batches)
        racer.set_rate(schedule(step, trial.steps))
        racer.step(x, y)
        seconds += time.process_time() - start
        if step == trial.steps or (step % every == 0 and step >= FROM * task.steps):
            loss = task.evaluate(model)
            trace.append([step, round(seconds, 3), round(loss, 5) if math.isfinite(loss) else None])
            if not math.isfinite(loss):
                break
        if step % TURN == 0:
            yield None
    yield record(task, trial) | {"trace": trace}


def record(task: RaceTask, trial: Trial) -> dict[str, Any]:
    """What a run is known by: the sizes, the settings and the trial."""
    settings = ENTRIES[task.name][trial.name].settings
    return {"task": task.about, "of": task.steps, "settings": settings, **vars(trial)}


def known_by(line: Mapping[str, Any]) -> str:
    """A key of a record."""
    return json.dumps({key: value for key, value in line.items() if key != "trace"}, sort_keys=True)


def in_turns(task: RaceTask, trials: Sequence[Trial], file: Path) -> list[dict[str, Any]]:
    """A record for every trial: those that the file holds are not run again, new ones are added to it."""
    held: dict[str, dict[str, Any]] = {}
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines()
        held = {known_by(line): line for line in map(json.loads, lines)}
    wanted = {known_by(record(task, trial)): trial for trial in trials}
    running = {key: steps_of(task, trial) for key, trial in wanted.items() if key not in held}
    while running:
        for key, run in list(running.items()):
            line = next(run)
            if line is None:
                continue
            del running[key]
            held[key] = line
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            step, seconds, loss = line["trace"][-1]
            trial = wanted[key]
            say(f"  {task.name}, {trial.name}, lr {trial.lr:.3g}, seed {trial.seed}: {loss} at {step}, {seconds:.1f} s")
    return [held[key] for key in wanted]


def final(line: Mapping[str, Any]) -> float:
    """The validation loss at the end of a run; infinity where it is no number."""
    loss = line["trace"][-1][2]
    return math.inf if loss is None else loss


def crossing(line: Mapping[str, Any], target: float) -> tuple[int, float] | None:
    """Steps and CPU-seconds of the first evaluation at or below the target: nothing is interpolated."""
    return next(((n, s) for n, s, loss in line["trace"] if loss is not None and loss <= target), None)


def next_rate(tried: Mapping[float, float], centre: float) -> float:
    """The learning rate that a sweep tries next, from the losses of those before.

    First the centre, then three times that; after these a factor of 3 beyond the best where that is at an end of what
    was tried, and else between the two best.
    """
    if len(tried) < 2:
        return 3 * centre if tried else centre
    ordered = sorted(tried)
    best, second = sorted(tried, key=lambda lr: tried[lr])[:2]
    if best == ordered[-1]:
        return 3 * best
    if best == ordered[0]:
        return best / 3
    return math.sqrt(best * second)


def sweep(task: RaceTask, names: Iterable[str], budget: int, steps: Mapping[str, int], file: Path) -> list[dict]:
    """Records of so many learning rates for every contestant, seed 0; all of one round in turns."""
    lines: dict[str, dict[float, dict[str, Any]]] = {name: {} for name in names}
    for _ in range(budget):
        trials = [
            Trial(
                name, next_rate({lr: final(x) for lr, x in found.items()}, ENTRIES[task.name][name].lr), steps[name], 0
            )
            for name, found in lines.items()
        ]
        for trial, line in zip(trials, in_turns(task, trials, file), strict=True):
            lines[trial.name][trial.lr] = line
    return [line for found in lines.values() for line in found.values()]


def best_rates(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate with the lowest loss at the end, by contestant."""
    found: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if line["name"] not in found or final(line) < final(found[line["name"]]):
            found[line["name"]] = line
    return {name: line["lr"] for name, line in found.items()}


def peak(task: RaceTask, name: str, lr: float) -> int:
    """Most bytes of tensors at a time, from the making of the optimiser to the end of its third step."""
    batches = task.batches(0)
    few = [next(batches) for _ in range(3)]
    entry = ENTRIES[task.name][name]
    model = task.make_model(0)
    kept = []

    def run() -> None:
        kept.append(entry.make(model, task, lr, 0, **entry.settings))
        for x, y in few:
            kept[0].step(x, y)

    return peak_bytes(run)
