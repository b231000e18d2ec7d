"""The baselines' settings: learning rate x batch size for Adam and Nesterov SGD, the same CPU-seconds for every setting.

All settings of a task take turns (so that a noisy machine disturbs all alike) until half of the budget is spent; the
best three of each optimiser then spend the other half. The score is the training error at the end of the budget: the
better of the iterate and of the running average with xi = 0.99. The winners and all results are written to
src/natgrad_lab/recipes/baselines.json, where `natgrad race` and the benchmarks find them.

    python -m benchmarks sweep
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, load, one_thread, run_cpu, say
from natgrad_lab import optimizers
from natgrad_lab.records import environment, finite
from natgrad_lab.runner import XI, Diverged, Runner

RECIPE = ROOT / "src" / "natgrad_lab" / "recipes" / "baselines.json"
GRID: dict[str, list[dict[str, float]]] = {
    name: [{"lr": lr, "batch_size": m} for m, lr in itertools.product((250, 500), rates)]
    for name, rates in {"adam": (5e-4, 1e-3, 2e-3, 4e-3), "nesterov": (1e-3, 3e-3, 1e-2, 3e-2)}.items()
}
BUDGETS: dict[str, float] = {"curves": 20.0, "digits": 6.0, "mnist": 30.0}
SURVIVORS = 3
SLICES = 5  # turns that each setting takes in each half of the budget
CASES = 10_000  # training and test cases of an evaluation


@dataclass
class Entry:
    """One optimiser with one setting."""

    name: str
    settings: dict[str, float]
    runner: Runner
    problem: str = ""
    at_half: float = math.inf
    error: float = math.inf
    test_error: float = math.nan

    def score(self) -> None:
        """Measure the errors now; a run that diverged has an infinite one."""
        self.error, self.test_error = math.inf, math.nan
        if not self.problem:
            try:
                evaluation = self.runner.evaluate()
                self.error, self.test_error = evaluation.train_error, evaluation.test_error
            except Diverged as problem:
                self.problem = str(problem)

    def record(self) -> dict[str, Any]:
        """The row of the table of results."""
        return {
            "optimizer": self.name,
            **self.settings,
            "updates": self.runner.update,
            "cpu_seconds": round(self.runner.clock.cpu_seconds, 2),
            "error_at_half": round(self.at_half, 3),
            "train_error": round(self.error, 3),
            "test_error": round(self.test_error, 3),
            "note": "diverged" if self.problem else "",
        }


def sweep(
    task: Any,
    seconds: float,
    *,
    grid: dict[str, list[dict[str, float]]] | None = None,
    seed: int = 0,
    survivors: int = SURVIVORS,
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """The best settings of each optimiser and a row for each setting that was tried, best first."""
    entries = []
    for name, several in (grid or GRID).items():
        for settings in several:
            model = task.make_model(seed=seed, activation="tanh").to(task.x_train.device)
            competitor = optimizers.make(name, task, model, seed=seed, settings=settings)
            entries.append(Entry(name, settings, Runner(competitor, task, seed=seed, subset=CASES)))
    _run(entries, 0.0, seconds / 2)
    for entry in entries:
        entry.score()
        entry.at_half = entry.error
    best: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    names = list(dict.fromkeys(entry.name for entry in entries))
    kept = {name: _ranked(entries, name)[:survivors] for name in names}
    _run([entry for several in kept.values() for entry in several], seconds / 2, seconds)
    for name in names:
        for entry in kept[name]:
            entry.score()
        ranked = sorted(kept[name], key=lambda entry: entry.error)
        best[name] = ranked[0].settings
        rows += [entry.record() for entry in [*ranked, *_ranked(entries, name, without=kept[name])]]
    return best, rows


def _ranked(entries: Sequence[Entry], name: str, without: Sequence[Entry] = ()) -> list[Entry]:
    return sorted((e for e in entries if e.name == name and e not in without), key=lambda entry: entry.at_half)


def _run(entries: Sequence[Entry], start: float, end: float) -> None:
    for part in range(1, SLICES + 1):
        until = start + (end - start) * part / SLICES
        say(f"  {len(entries)} settings to {until:.1f} CPU-seconds each")
        for entry in entries:
            if not entry.problem:
                entry.problem = run_cpu(entry.runner, until)


def write(path: Path, found: dict[str, Any], tables: dict[str, Any], budgets: dict[str, float], command: str) -> None:
    """The recipe: the winners by task, and how they were found."""
    about = (
        "Settings of the first-order methods, found by the command below: learning rate x batch size, the same CPU-seconds "
        "of one thread for every setting of a task, tanh units, seed 0. All settings ran for half of the budget, the best "
        f"three of each optimiser for all of it; train_error is the better of the iterate and of the running average (xi = "
        f"{XI}) on {CASES} training cases at the end. 'nesterov' is Nesterov SGD with the momentum schedule of Sutskever et "
        "al. (2013) and mu_max = 0.99. No sweep was made for faces: they use the settings of mnist."
    )
    tasks = {**found, **({"faces": found["mnist"]} if "mnist" in found else {})}
    record = {"about": about, "command": command, "cpu_seconds": budgets, **tasks, "results": tables}
    surroundings = {k: v for k, v in environment().items() if k != "command"}
    text = json.dumps(finite({**record, "environment": surroundings}), indent=1, allow_nan=False)
    path.write_text(_one_row_a_line(text) + "\n", encoding="utf-8")


def _one_row_a_line(text: str) -> str:
    """Innermost mappings on one line each, for a table that can be read."""
    lines: list[str] = []
    inner: list[str] | None = None
    source = text.split("\n")
    for i, line in enumerate(source):
        if inner is not None:
            inner.append(line.strip())
            if line.strip() in ("}", "},"):
                lines.append(inner[0] + " ".join(inner[1:-1]) + inner[-1])
                inner = None
        elif line.endswith("{") and _closes_before_opening(source[i + 1 :]) and i > 0:
            inner = [line]
        else:
            lines.append(line)
    return "\n".join(lines)


def _closes_before_opening(rest: Sequence[str]) -> bool:
    for line in rest:
        if line.strip() in ("}", "},"):
            return True
        if line.endswith(("{", "[")):
            return False
    return False


def show(tables: dict[str, list[dict[str, Any]]]) -> str:
    """The tables of results as markdown."""
    from benchmarks.measure import table

    header = ["optimiser", "lr", "m", "updates", "error at half", "training error", "test error"]
    keys = ["optimizer", "lr", "batch_size", "updates", "error_at_half", "train_error", "test_error"]
    return "\n\n".join(
        f"{task}\n\n" + table(header, [[_cell(row, key) for key in keys] for row in rows])
        for task, rows in tables.items()
    )


def _cell(row: dict[str, Any], key: str) -> Any:
    if key == "train_error" and row["error_at_half"] == row["train_error"]:
        return None  # dropped at half of the budget
    return f"{row[key]:g}" if key in ("lr", "batch_size") else row[key]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default=",".join(BUDGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all budgets by this (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RECIPE, help="the file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    one_thread()
    names = options.tasks.split(",")
    command = f"python -m benchmarks sweep --tasks {options.tasks}" + (
        f" --scale {options.scale:g}" * (options.scale != 1)
    )
    found: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    budgets = {name: BUDGETS[name] * options.scale for name in names}
    for name in names:
        say(f"{name}: {budgets[name]:g} CPU-seconds for each setting")
        found[name], tables[name] = sweep(load(name), budgets[name])
        write(options.out, found, tables, budgets, command)
        say(f"{name}: {found[name]}")
    print(show(tables))


if __name__ == "__main__":
    main()
