"""What a search shows in the terminal: a bar and each new best trial while it runs, a table when it is over."""

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from natgrad_lab.display import count, number
from natgrad_lab.search.study import results


class Watch:
    """One bar for the whole search; a line for each trial that is better than all before."""

    def __init__(self, total: int, study: Study, console: Console) -> None:
        self.console = console
        self._best = min((t.value for t in best(study, 1) if t.value is not None), default=float("inf"))
        self._progress = Progress(
            TextColumn("best {task.fields[best]:>7}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=total, completed=len(results(study)), best=number(self._best))

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def finished(self, trial: FrozenTrial, done: int) -> None:
        """Show it."""
        if trial.value is not None and trial.value < self._best:
            self._best = trial.value
            values = ", ".join(f"{name} {_value(value)}" for name, value in trial.params.items())
            self.console.print(f"trial {trial.number}: error {number(trial.value)}, {values}", soft_wrap=True)
        self._progress.update(self._bar, completed=done, best=number(self._best))


def best(study: Study, n: int) -> list[FrozenTrial]:
    """The `n` trials with the smallest errors, the smallest first."""
    complete = [t for t in results(study) if t.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda t: (t.value if t.value is not None else float("inf"), t.number))[:n]


def table(study: Study, n: int = 10) -> Table:
    """The best trials, in 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in headings(study):
        made.add_column(heading.replace(" ", "\n").replace(".", ".\n"), justify="right")
    for i, trial in enumerate(best(study, n)):
        made.add_row(*cells(trial, study), style="bold" if i == 0 else "")
    return made


def headings(study: Study) -> list[str]:
    """Of the columns of `cells`."""
    return ["trial", "training error", "test error", *_names(study), "updates", "seconds"]


def cells(trial: FrozenTrial, study: Study) -> list[str]:
    """One trial as text."""
    about = trial.user_attrs
    errors = [trial.value, about.get("test_error")]
    return [
        str(trial.number),
        *(number(e) if e is not None else "–" for e in errors),
        *(_value(trial.params[name]) if name in trial.params else "–" for name in _names(study)),
        count(about["updates"]) if about.get("updates") is not None else "–",
        f"{about['seconds']:.1f}" if about.get("seconds") is not None else "–",
    ]


def verdict(study: Study) -> str:
    """The best trial in one sentence."""
    done = results(study)
    bad = sum(t.state != TrialState.COMPLETE for t in done)
    failed = f", {bad} of them without a result" if bad else ""
    leader = best(study, 1)
    if not leader:
        return f"No trial has a result ({len(done)} tried{failed})."
    (trial,) = leader
    values = ", ".join(f"{name} = {_value(value)}" for name, value in trial.params.items())
    return f"Best of {len(done)} trials{failed}: training error {number(trial.value or 0.0)} with {values}."


def _names(study: Study) -> list[str]:
    return list(dict.fromkeys(name for trial in results(study) for name in trial.params))


def _value(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)
