"""`natgrad search TASK`: look for hyper-parameters of an optimiser, with biased random search or others."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from natgrad_lab.arguments import Refused, check_positive, check_task, load, output_folder, refusing, set_threads, warn

if TYPE_CHECKING:  # torch and optuna take seconds to import: `natgrad --help` does without
    from optuna.study import Study

INTERRUPTED = 130
STORAGE = "search.db"  # in the output folder, unless --storage says otherwise


class Activation(StrEnum):
    """Hidden units of the autoencoders."""

    tanh = "tanh"
    sigmoid = "sigmoid"


def search(
    task: Annotated[str, typer.Argument(metavar="TASK", help="curves, digits, mnist or faces.")],
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="Whose hyper-parameters: sgd, adam, kfac …")] = "sgd",
    sampler: Annotated[str, typer.Option(metavar="NAME", help="biased, random, grid or tpe.")] = "biased",
    trials: Annotated[int, typer.Option(metavar="N", help="Trials that the study is to have in the end.")] = 50,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds of updates for each trial. Default: 5.")
    ] = None,
    updates: Annotated[int | None, typer.Option(metavar="K", help="Updates for each trial, not seconds.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="memory, an SQLite file or a database URL. Default: DIR/search.db."),
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Of the study. Default: TASK-OPTIMIZER.")] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Trials at a time, each in a process of its own.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/search-TASK-OPTIMIZER.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler, the initial parameters and the batch order.")] = 0,
    activation: Annotated[Activation, typer.Option(help="Hidden units of the network.")] = Activation.tanh,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Folder with the data files (mnist, olivetti).")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads, without --jobs.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Search for hyper-parameters: a table of the best trials, Optuna's plots, report.html.

    A study lives in its storage: the same command continues it after Ctrl-C or a kill, and several commands at once,
    on any machines, share one. Ctrl-C keeps what was measured.
    """
    check_task(task)
    if seconds is not None and updates is not None:
        raise Refused("--seconds and --updates exclude each other; give one of them")
    for option, value in (("--trials", trials), ("--jobs", jobs), ("--seconds", seconds), ("--updates", updates)):
        if value is not None:
            check_positive(option, value)
    if seed < 0:
        raise Refused(f"--seed is {seed}; it must be at least 0")
    from natgrad_lab.optimizers import check_name, unknown
    from natgrad_lab.search import spaces
    from natgrad_lab.search import study as searching
    from natgrad_lab.search.trial import Budget, Workers

    if sampler not in searching.SAMPLERS:
        raise Refused(unknown("sampler", sampler, searching.SAMPLERS))
    with refusing():
        space = spaces.space_of(check_name(optimizer))
    set_threads(threads)
    folder = output_folder(out or Path("runs") / f"search-{task}-{optimizer}", "--out")
    budget = Budget(optimizer, None if updates else seconds or 5.0, updates, seed, activation.value)
    name = study or f"{task}-{optimizer}"
    console = Console(highlight=False)
    _quiet()
    with refusing():
        opened = searching.open_storage(storage or str(folder / STORAGE))
        made = searching.open_study(opened, name, task, budget, space)
        made.sampler = searching.make_sampler(sampler, made, space, trials, seed)
    loaded = load(task, data, device, console)
    from natgrad_lab.search.display import Watch

    total = searching.wanted(made, sampler, trials)
    there = len(searching.results(made))
    each = f"{updates} updates" if updates else f"{budget.seconds:g} s"
    before = f"; {there} are done" if there else ""
    console.print(
        f"Searching {', '.join(space)} of {optimizer} on {task}: {sampler}, {total} trials of {each}{before}. "
        "Ctrl-C ends it early.",
        soft_wrap=True,
    )
    with Watch(total, made, console) as watch:
        run = searching.Search(made, sampler, space, budget, total, watch)
        stopped = run.run(loaded) if jobs == 1 else run.run_in(Workers(jobs, task, data, device), jobs)
    _finish(made, folder, console)
    if stopped:
        if storage == "memory":
            warn("the study was in memory and ends here; its trials are in the report")
        else:
            console.print("The same command goes on from here.")
        raise typer.Exit(INTERRUPTED)
    if all(trial.value is None for trial in searching.results(made)):
        raise typer.Exit(1)


def _quiet() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _finish(study: "Study", folder: Path, console: Console) -> None:
    """Print the table and write the report, undisturbed by an impatient Ctrl-C."""
    from natgrad_lab.search import report
    from natgrad_lab.search.display import table, verdict
    from natgrad_lab.signals import ignored

    with ignored():
        console.print(table(study))
        console.print(verdict(study))
        path = report.write(study, folder)
        console.print(f"Report: {path}", soft_wrap=True)
