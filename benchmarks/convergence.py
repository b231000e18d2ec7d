"""How fast the error falls: updates and CPU-seconds of K-FAC, EigenAdam, Adam and Nesterov SGD to training errors.

Each optimiser has the settings of its recipe (the baselines' come from the sweep) and the same averaging: an error is
the better of the iterate's and of the running average's, on 10 000 training cases; the test error is that of the same
parameters. All start from the same parameters and take turns in slices of their CPU-seconds; evaluation is outside
the clock. K-FAC and EigenAdam are evaluated every 5 updates, the others every half second; while 2000 of the cases say
that the next error of the table is still more than a tenth away, the other cases are left out.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import CASES, enter, first_at, load, median, positive, ratio, run_cpu, say
from benchmarks.report import cell, save, table
from natgrad_lab.runner import SUBSET, Runner, reconstruction_error

ERRORS = (15.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5)
SECONDS: dict[str, float] = {"kfac": 60.0, "eigen-adam": 60.0, "adam": 120.0, "nesterov": 120.0}
TITLES = {
    "kfac": "K-FAC",
    "eigen-adam": "EigenAdam",
    "eigen-adam-bf16": "EigenAdam in bf16",
    "adam": "Adam",
    "nesterov": "Nesterov SGD",
    "muon": "Muon",
    "soap": "SOAP",
}
OURS = ("kfac", "eigen-adam", "eigen-adam-bf16")
EVERY_UPDATES = 5  # ours
EVERY_SECONDS = 0.5  # the others
SLICES = 40
ROUGHLY = 1.1

# whose, error, of what, against whom, times fewer, goal after that
Target = tuple[str, float, str, str, float, float | None]
TARGETS: dict[str, tuple[Target, ...]] = {
    "curves": (
        ("kfac", 10.0, "updates", "adam", 15.0, None),
        ("kfac", 10.0, "seconds", "adam", 2.0, 3.0),
        ("kfac", 10.0, "updates", "nesterov", 25.0, None),
        ("kfac", 10.0, "seconds", "nesterov", 3.0, None),
        ("kfac", 8.0, "seconds", "adam", 2.5, 4.0),
        ("eigen-adam", 10.0, "seconds", "adam", 3.0, 5.0),
        ("eigen-adam", 8.0, "seconds", "adam", 3.0, 5.0),
    ),
    "mnist": (
        ("kfac", 10.0, "seconds", "adam", 1.0, None),
        ("kfac", 8.0, "seconds", "adam", 1.0, None),
        ("kfac", 6.0, "seconds", "adam", 1.5, None),
        ("kfac", 5.0, "seconds", "adam", 1.0, None),
        ("eigen-adam", 6.0, "seconds", "adam", 2.0, None),
    ),
}


@dataclass
class Run:
    """One optimiser from one seed: its runner, and the first evaluation at or below each error."""

    name: str
    seed: int
    seconds: float
    runner: Runner
    errors: Sequence[float] = ERRORS
    reached: list[dict[str, Any]] = field(default_factory=list)
    trace: list[tuple[int, float, float]] = field(default_factory=list)  # update, CPU-seconds, error of 2000 cases
    over: str = ""
    _due: float = 0.0

    def after(self, runner: Runner) -> bool:
        """Evaluate if it is time to; whether the last error is reached."""
        now = runner.update if self.name == "kfac" else runner.clock.cpu_seconds
        if now >= self._due:
            self._due = now + (EVERY_UPDATES if self.name == "kfac" else EVERY_SECONDS)
            self.evaluate()
        return len(self.reached) == len(self.errors)

    def evaluate(self) -> None:
        """Record the error now, and which errors of the table it is the first to reach."""
        task, at = self.runner.task, (self.runner.update, round(self.runner.clock.cpu_seconds, 3))
        models = {"iterate": self.runner.competitor.model, "average": self.runner.average.module}

        def error(which: str, cases: int) -> float:
            return reconstruction_error(models[which], task.likelihood, task.x_train[:cases], task.y_train[:cases])

        rough = min(error(which, SUBSET) for which in models)
        self.trace.append((*at, round(rough, 3)))
        if rough > ROUGHLY * self.errors[len(self.reached)]:
            return
        train, which = min((error(which, CASES), which) for which in models)
        new = [wanted for wanted in self.errors[len(self.reached) :] if train <= wanted]
        if new:
            x, y = task.x_test[:CASES], task.y_test[:CASES]
            test = reconstruction_error(models[which], task.likelihood, x, y)
            row = {"updates": at[0], "seconds": at[1], "train_error": train, "test_error": test, "of": which}
            self.reached += [{"error": wanted, **row} for wanted in new]

    def record(self) -> dict[str, Any]:
        """What is kept of the run."""
        return {
            "optimizer": self.name,
            "seed": self.seed,
            "updates": self.runner.update,
            "cpu_seconds": round(self.runner.clock.cpu_seconds, 2),
            "over": self.over,
            "reached": self.reached,
            "trace": self.trace,
        }


def measure(
    task: Any, seeds: Sequence[int], seconds: dict[str, float], *, errors: Sequence[float] = ERRORS
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """A record for each seed and optimiser, and the optimisers' settings."""
    records, settings = [], {}
    for seed in seeds:
        runs = []
        for name, limit in seconds.items():
            competitor = enter(name, task, seed=seed)
            settings[name] = competitor.settings
            runs.append(Run(name, seed, limit, Runner(competitor, task, seed=seed), errors))
        for part, run in itertools.product(range(1, SLICES + 1), runs):
            if not run.over:
                run.over = run_cpu(run.runner, run.seconds * part / SLICES, run.after)
        for run in runs:
            say(f"  {task.name}, seed {seed}, {run.name}: {len(run.reached)} errors reached, last {run.trace[-1]}")
        records += [run.record() for run in runs]
    return records, settings


def medians(records: Sequence[dict[str, Any]], name: str, error: float) -> dict[str, Any]:
    """Median over the seeds of the updates, CPU-seconds and test error at which an optimiser reached an error.

    "at least" has what it had spent, for ratios, where too few of its runs got there.
    """
    runs = [record for record in records if record["optimizer"] == name]
    rows = [first_at(run["reached"], error) or {} for run in runs]
    found: dict[str, Any] = {key: median(row.get(key) for row in rows) for key in ("updates", "seconds", "test_error")}
    return found | {
        "at least": {"updates": median(r["updates"] for r in runs), "seconds": median(r["cpu_seconds"] for r in runs)}
    }


def fewer(
    records: Sequence[dict[str, Any]], error: float, of: str, against: str, ours_is: str = "kfac"
) -> tuple[float | None, str]:
    """How many times fewer updates or seconds ours needs than the other; the number, and the cell of the table.

    Where the other did not get there within its time, the ratio is at least what it had spent by ours.
    """
    ours, theirs = medians(records, ours_is, error)[of], medians(records, against, error)
    if ours is None or theirs[of] is not None:
        value = ratio(theirs[of], ours)
        return value, cell(value)
    value = ratio(theirs["at least"][of], ours)
    return value, f"> {cell(value)}"


def crossings(records: Sequence[dict[str, Any]], errors: Sequence[float] = ERRORS) -> str:
    """Updates, CPU-seconds and test error at which each optimiser reached each error; medians over the seeds."""
    names = list(dict.fromkeys(record["optimizer"] for record in records))
    header = ["error", *(f"{TITLES[name]}, {what}" for name in names for what in ("updates", "s", "test error"))]
    lines = []
    for error in errors:
        found = [medians(records, name, error) for name in names]
        lines.append([cell(error), *(row[key] for row in found for key in ("updates", "seconds", "test_error"))])
    return table(header, lines)


def ratios(records: Sequence[dict[str, Any]], errors: Sequence[float] = ERRORS, ours: str = "kfac") -> str:
    """How many times fewer updates and seconds ours needs than each of the others."""
    others = [name for name in dict.fromkeys(record["optimizer"] for record in records) if name not in OURS]
    pairs = list(itertools.product(others, ("updates", "seconds")))
    lines = [[cell(error), *(fewer(records, error, of, other, ours)[1] for other, of in pairs)] for error in errors]
    return table(["error", *(f"{TITLES[other]} / {TITLES[ours]}, {of}" for other, of in pairs)], lines)


def against_targets(records: Sequence[dict[str, Any]], task: str) -> str:
    """The targets of a task, what was reached, and whether that meets them."""
    lines, raced = [], {record["optimizer"] for record in records}
    for ours, error, of, against, target, goal in TARGETS.get(task, ()):
        if not {ours, against} <= raced:
            continue
        value, text = fewer(records, error, of, against, ours)
        met = value is not None and value >= target
        beyond = None if goal is None else value is not None and value >= goal
        lines.append([f"{TITLES[against]} / {TITLES[ours]}, {of} to error {error:g}", text, target, met, goal, beyond])
    return table(["", "measured", "at least", "met", "goal", "met"], lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", default="curves", choices=sorted(TARGETS), help="default: %(default)s")
    parser.add_argument("--seeds", type=positive(int), default=3, help="so many, from 0 (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=positive(float),
        help="CPU-seconds of the first-order methods (default: 120); K-FAC and EigenAdam have half",
    )
    parser.add_argument(
        "--optimizers",
        default=",".join(SECONDS),
        help=f"comma-separated, out of {','.join(TITLES)} (default: %(default)s)",
    )


def main(options: argparse.Namespace) -> None:
    task, scale = load(options.task), 1.0 if options.seconds is None else options.seconds / SECONDS["adam"]
    names = options.optimizers.split(",")
    if unknown := [name for name in names if name not in TITLES]:
        raise ValueError(f"--optimizers: {', '.join(unknown)} is none of {', '.join(TITLES)}")
    seconds = {name: SECONDS["kfac" if name in OURS else "adam"] * scale for name in names}
    records, settings = measure(task, range(options.seeds), seconds)
    lost = [
        f"{TITLES[r['optimizer']]}, seed {r['seed']}: {r['over']}" for r in records if r["over"] not in ("", "stopped")
    ]
    baselines = "; ".join(
        f"{TITLES[name]}: " + ", ".join(f"{key} {value:g}" for key, value in settings[name].items())
        for name in settings
        if name not in OURS
    )
    ours = [name for name in OURS if name in settings]
    comparisons = [
        part
        for name in ours
        for part in (
            f"How many times fewer {TITLES[name]} needs (`>`: the other did not get there in its time):",
            ratios(records, ours=name),
        )
    ]
    save(
        f"convergence-{task.name}",
        f"Updates and seconds to an error: {task.name}",
        [
            f"Medians of {options.seeds} seeds; tanh units; CPU-seconds of one thread. The error is the better of the "
            f"iterate's and of the running average's. {baselines}. Time limits: "
            + ", ".join(f"{TITLES[name]} {value:g} s" for name, value in seconds.items())
            + (f". EigenAdam: {settings['eigen-adam']['batch_size']}" if "eigen-adam" in settings else "")
            + ". A dash: not reached by most seeds."
            + (f" Runs that ended early: {'; '.join(lost)}." if lost else ""),
            crossings(records),
            *comparisons,
            against_targets(records, task.name),
        ],
        {"errors": ERRORS, "seconds": seconds, "settings": settings, "runs": records},
        command=options.command,
        settings=settings.get("kfac"),
        folder=options.out,
    )
