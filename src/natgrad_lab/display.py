"""What a race shows in the terminal: progress bars while it runs, tables and one sentence when it is over."""

import math
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from natgrad_lab.plots import shown
from natgrad_lab.race import targets
from natgrad_lab.records import End, Evaluation, Race, Trace
from natgrad_lab.runner import Runner


class Bars:
    """One progress bar per optimiser: its current error, its updates, the seconds that it has left.

    Where the output is no terminal, a plain line at a few moments takes their place.
    """

    LINES_AT = (0.1, 0.25, 0.5, 0.75, 1.0)

    def __init__(self, names: Sequence[str], seconds: float, console: Console) -> None:
        self.seconds = seconds
        self.console = console
        self._live = console.is_terminal
        self._last_draw = 0.0
        self._printed = dict.fromkeys(names, 0)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("error {task.fields[error]:>7}", justify="right"),
            TextColumn("{task.fields[updates]:>7} updates", justify="right"),
            TextColumn("{task.fields[left]:>10}", justify="right"),
            console=console,
            expand=True,
            refresh_per_second=4,
            disable=not self._live,
        )
        width = max(len(name) for name in names)
        self._bars: dict[str, TaskID] = {
            name: self._progress.add_task(name.ljust(width), total=seconds, error="–", updates="0", left=self._left(0))
            for name in names
        }

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def updated(self, runner: Runner) -> None:
        """Move the bar, a few times a second at most."""
        now = time.perf_counter()
        if self._live and now - self._last_draw > 0.2:
            self._last_draw = now
            seconds = runner.clock.read()
            self._progress.update(
                self._bars[runner.competitor.name],
                completed=min(seconds, self.seconds),
                updates=str(runner.update),
                left=self._left(seconds),
            )

    def evaluated(self, evaluation: Evaluation) -> None:
        """Show the new error."""
        name, seconds = evaluation.optimizer, evaluation.seconds
        self._progress.update(
            self._bars[name],
            completed=min(seconds, self.seconds),
            error=number(evaluation.train_error),
            updates=str(evaluation.update),
            left=self._left(seconds),
        )
        if not self._live:
            passed = sum(seconds >= share * self.seconds for share in self.LINES_AT)
            if passed > self._printed[name]:
                self._printed[name] = passed
                self.console.print(
                    f"{name}: {seconds:.0f} of {self.seconds:g} s, error {number(evaluation.train_error)}, "
                    f"{evaluation.update} updates",
                    highlight=False,
                )

    def ended(self, end: End) -> None:
        """Mark the bar of an optimiser whose run is over."""
        word = "done" if end.reason == "finished" else end.reason
        done = self.seconds if end.reason == "finished" else None
        self._progress.update(self._bars[end.optimizer], completed=done, left=word, updates=str(end.update))

    def _left(self, seconds: float) -> str:
        return f"{max(0.0, self.seconds - seconds):.0f} s left"


def tables(race: Race) -> list[RenderableType]:
    """The result, and when each error was reached; both fit 80 columns."""
    return [_result_table(race), *_target_tables(race)]


def _result_table(race: Race) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    for heading in ("updates", "examples", "seconds", "training\nerror", "test\nerror", "peak\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    leader = best(race)
    for trace in race.traces.values():
        cells = result_cells(trace)
        table.add_row(trace.name, *cells, style="bold" if trace is leader else "")
    return table


def result_cells(trace: Trace) -> list[str]:
    """Updates, examples, seconds, training error, test error and peak memory of one optimiser, as text."""
    done = trace.end or trace.last
    reason = trace.end.reason if trace.end else "interrupted"
    if done is None:
        return ["0", "0", "0", reason, "–", "–"]
    errors = (
        [reason, "–"] if reason in ("diverged", "failed") else [number(trace.train_error), number(trace.test_error)]
    )
    memory = f"{trace.end.peak_bytes / 1e6:.0f} MB" if trace.end and trace.end.peak_bytes else "–"
    return [count(done.update), count(done.examples), f"{done.seconds:.1f}", *errors, memory]


def _target_tables(race: Race) -> list[RenderableType]:
    wanted = targets(race)
    if not wanted:
        return []
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for error in wanted:
        table.add_column(f"{error:g}", justify="right", no_wrap=True)
    for trace in race.traces.values():
        at = [trace.first_at(error) for error in wanted]
        table.add_row(
            f"{trace.name}\n", *(f"{e.seconds:.1f} s\n[dim]{count(e.update)}[/dim]" if e else "–\n" for e in at)
        )
    return ["Seconds, and below them updates, to reach a training error of", table]


def best(race: Race) -> Trace | None:
    """The optimiser with the least training error among those that neither diverged nor failed."""
    valid = [t for t in race.traces.values() if t.last and not (t.end and t.end.reason in ("diverged", "failed"))]
    return min(valid, key=lambda trace: trace.train_error, default=None)


def verdict(race: Race) -> str:
    """Who is ahead, and by how much, at the smallest error of the table that another one reached too."""
    leader = best(race)
    if leader is None:
        return "No optimiser has a result."
    head = f"{leader.name} is ahead with training error {number(leader.train_error)}"
    others = [t for t in race.traces.values() if t is not leader and t.last]
    family = leader.name.partition("-")[0]  # kfac is compared with other methods, not with kfac-paper, where it can be
    others = [t for t in others if t.name.partition("-")[0] != family] or others
    if not others:
        return head + "."
    behind = ", ".join(
        f"{t.name} {number(t.train_error)}" for t in others if not (t.end and t.end.reason == "diverged")
    )
    head += f" ({behind})." if behind else "."
    for error in reversed(targets(race)):
        mine = leader.first_at(error)
        theirs = [(t, e) for t in others if (e := t.first_at(error)) is not None]
        if mine is not None and theirs and mine.seconds > 0 and mine.update > 0:
            trace, other = min(theirs, key=lambda pair: pair[1].seconds)
            return head + (
                f" Error {error:g} took it {mine.seconds:.1f} s and {count(mine.update)} updates;"
                f" the next, {trace.name}, {other.seconds:.1f} s{_times(other.seconds / mine.seconds)}"
                f" and {count(other.update)} updates{_times(other.update / mine.update)}."
            )
    return head


def _times(ratio: float) -> str:
    """How much the leader is ahead, left out where it is behind."""
    return f" ({ratio:.1f} times)" if ratio >= 1.0 else ""


def notes(race: Race) -> list[str]:
    """A line for each optimiser that did not run to its end."""
    lines = []
    for trace in race.traces.values():
        if trace.end is None:
            lines.append(f"{trace.name}: cut off without an end")
        elif trace.end.reason != "finished":
            lines.append(f"{trace.name} {trace.end.reason} after {trace.end.update} updates: {trace.end.message}")
    return lines


def number(value: float) -> str:
    """Four significant digits, or a dash for what was not measured."""
    return shown(value) if math.isfinite(value) else "–"


def count(value: int) -> str:
    """A whole number, shortened from a million on."""
    return f"{value / 1e6:.2f}M" if value >= 1_000_000 else f"{value:,}".replace(",", " ")
