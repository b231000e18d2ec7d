"""The baselines' settings: learning rate x batch size for Adam and Nesterov SGD, the same CPU-seconds for each.

All settings of a task take turns, so that a noisy machine disturbs all alike, and all get the whole budget: on the
plateau where these networks start, half of a budget says nothing about the other half. The score is the training
error at the end: the better of the iterate and of the running average with xi = 0.99. The winners and all results are
written to src/natgrad_lab/recipes/baselines.json, where `natgrad race` and the benchmarks find them.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import CASES, ROOT, load_all, positive, run_cpu, say
from benchmarks.report import save, table, write_json
from natgrad_lab import optimizers
from natgrad_lab.records import environment
from natgrad_lab.runner import XI, Diverged, Runner

RECIPE = ROOT / "src" / "natgrad_lab" / "recipes" / "baselines.json"
GRID: dict[str, list[dict[str, float]]] = {
    name: [{"lr": lr, "batch_size": m} for m, lr in itertools.product((32, 64, 125, 250), rates)]
    for name, rates in {"adam": (5e-4, 1e-3, 2e-3, 4e-3), "nesterov": (1e-3, 3e-3, 1e-2, 3e-2)}.items()
}
BUDGETS: dict[str, float] = {"curves": 25.0, "digits": 4.0, "mnist": 30.0}
SLICES = 10  # turns that each setting takes
COLUMNS = ("optimizer", "lr", "batch_size", "updates", "train_error", "test_error", "note")
ABOUT = (
    "Settings of the first-order methods, found by the command below: learning rate x batch size, the same CPU-seconds "
    "of one thread for every setting of a task, tanh units, seed 0. train_error is the better of the iterate and of "
    f"the running average (xi = {XI}) on {CASES} training cases at the end of the budget. 'nesterov' is Nesterov SGD "
    "with the momentum schedule of Sutskever et al. (2013) and mu_max = 0.99. No sweep was made for faces: they use "
    "the settings of mnist."
)


def sweep(
    task: Any, seconds: float, grid: dict[str, list[dict[str, float]]] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for every setting: by optimiser, the best first."""
    grid = grid or GRID
    runners = []
    for name, several in grid.items():
        for settings in several:
            model = task.make_model(seed=seed, activation="tanh")
            competitor = optimizers.make(name, task, model, seed=seed, settings=settings)
            runners.append((settings, Runner(competitor, task, seed=seed, subset=CASES)))
    alive = [runner for _, runner in runners]
    for part in range(1, SLICES + 1):
        alive = [runner for runner in alive if not run_cpu(runner, seconds * part / SLICES)]
        say(f"  {task.name}: {len(alive)} settings have run for {seconds * part / SLICES:.1f} CPU-seconds")
    rows = [_row(settings, runner, runner in alive) for settings, runner in runners]
    order = list(grid)
    return sorted(rows, key=lambda row: (order.index(row["optimizer"]), row["train_error"]))


def _row(settings: dict[str, float], runner: Runner, alive: bool) -> dict[str, Any]:
    train = test = math.inf
    if alive:
        try:
            evaluation = runner.evaluate()
            train, test = evaluation.train_error, evaluation.test_error
        except Diverged:
            alive = False
    return {
        "optimizer": runner.competitor.name,
        **settings,
        "updates": runner.update,
        "cpu_seconds": round(runner.clock.cpu_seconds, 2),
        "train_error": round(train, 3),
        "test_error": round(test, 3),
        "note": "" if alive else "diverged",
    }


def best(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The winner's settings by optimiser; the rows are in the order of `sweep`."""
    winners: dict[str, dict[str, float]] = {}
    for row in rows:
        winners.setdefault(row["optimizer"], {"lr": row["lr"], "batch_size": row["batch_size"]})
    return winners


def recipe(results: dict[str, list[dict[str, Any]]], budgets: dict[str, float], command: str) -> dict[str, Any]:
    """The winners by task, and how they were found."""
    found = {task: best(rows) for task, rows in results.items()}
    faces = {"faces": found["mnist"]} if "mnist" in found else {}
    surroundings = {k: v for k, v in environment().items() if k != "command"}
    record = {"about": ABOUT, "command": command, "cpu_seconds": budgets, **found, **faces, "results": results}
    return {**record, "environment": surroundings}


def at_edge(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The winners' settings that are the smallest or largest of several that were tried: better ones may lie beyond."""
    found = []
    for name, winner in best(rows).items():
        for key, value in winner.items():
            tried = {row[key] for row in rows if row["optimizer"] == name}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                found.append(f"{name} {key} = {value:g} ({'smallest' if value == min(tried) else 'largest'})")
    return found


def tables(record: dict[str, Any]) -> list[str]:
    """What was tried, by task; the best of each optimiser first."""
    parts = []
    for task, rows in record["results"].items():
        parts.append(f"{task}, {record['cpu_seconds'][task]:g} CPU-seconds for each setting:")
        parts.append(table(COLUMNS, [[row[key] for key in COLUMNS] for row in rows]))
        if found := at_edge(rows):
            parts.append(f"At the edge of what was tried, so that better settings may lie beyond: {', '.join(found)}.")
    return parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default=",".join(BUDGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--scale", type=positive(float), default=1.0, help="multiply all budgets by this (default: %(default)s)"
    )
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, help="the file to write (default: the recipe of the bench)"
    )


def main(options: argparse.Namespace) -> None:
    tasks = load_all(options.tasks)
    budgets = {task.name: BUDGETS.get(task.name, 30.0) * options.scale for task in tasks}
    results: dict[str, list[dict[str, Any]]] = {}
    record: dict[str, Any] = {}
    for task in tasks:
        results[task.name] = sweep(task, budgets[task.name])
        record = recipe(results, budgets, options.command)
        write_json(options.recipe, record)
    text = [ABOUT, *tables(record)]
    save("sweep", "The sweep", text, {"recipe": options.recipe.name}, command=options.command, folder=options.out)
