"""What the benchmarks share: CPU clocks, runs of so many CPU-seconds, times to an error, ratios, tables, result files."""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from natgrad_lab.files import DataError
from natgrad_lab.records import environment, finite
from natgrad_lab.runner import Diverged, Runner

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CASES = 10_000  # training and test cases of an evaluation


def command() -> str:
    """What was typed, as far as the results depend on it."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and argument.partition("=")[0] not in ("--recipe", "--out"):
            kept.append(argument)
        skip = not skip and argument in ("--recipe", "--out")
    return " ".join(["python -m benchmarks", *kept])


def one_thread() -> None:
    """CPU-seconds of one thread: more threads would spend CPU time on waiting for each other."""
    torch.set_num_threads(1)


def say(message: str) -> None:
    """One line of progress, on the error stream, so that the output can be kept as a table."""
    print(message, file=sys.stderr, flush=True)


def run_cpu(runner: Runner, until: float, *, stop: Callable[[Runner], bool] = lambda runner: False) -> str:
    """Update until the runner's clock reads `until` CPU-seconds; the evaluation is the caller's, outside the clock.

    Args:
        runner: What to step.
        until: CPU-seconds on the runner's own clock.
        stop: Asked between updates, outside the clock; true ends the run.

    Returns:
        "" or why the run diverged.
    """
    try:
        while runner.clock.cpu_seconds < until and not stop(runner):
            runner.clock.start()
            try:
                runner.advance()
            finally:
                runner.clock.stop()
    except Diverged as problem:
        return str(problem)
    return ""


def first_at(rows: Iterable[Mapping[str, Any]], error: float, key: str = "train_error") -> Mapping[str, Any] | None:
    """The first evaluation whose error is at most `error`: nothing is interpolated."""
    return next((row for row in rows if row[key] <= error), None)


def median(values: Iterable[float | None]) -> float | None:
    """The median; a run that did not get there (None) counts as later than all others, so the median may be None."""
    known = [math.inf if v is None else v for v in values]
    if not known:
        return None
    middle = statistics.median(known)
    return middle if math.isfinite(middle) else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None where one of them is missing or b is 0."""
    return None if a is None or b is None or b == 0 else a / b


def number(value: Any, digits: int = 3) -> str:
    """A cell: three significant digits, thousands in full, a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(decimals, 8)}f}"
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], digits: int = 3) -> str:
    """A markdown table; the first column is text, the others are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(number(cell, digits) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def load(task: str) -> Any:
    """A task's data in full; ends the program with one line where the data are missing."""
    from natgrad_lab import data

    try:
        return data.load(task, folder=None if "NATGRAD_DATA" in __import__("os").environ else _beside())
    except DataError as error:
        raise SystemExit(f"benchmarks: {error}") from error


def _beside() -> Path | None:
    """The folder of data sets beside the checkout, if there is one."""
    folder = ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def save(name: str, result: Mapping[str, Any], text: str, folder: Path | None = None) -> None:
    """Print the tables and write `name`.json and `name`.md into the results' folder."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    record = finite({**result, "environment": environment()})
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)
