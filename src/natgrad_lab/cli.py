"""The command `natgrad`. Whatever a user gets wrong is answered by one line on the error stream and exit code 2."""

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from natgrad_lab import cli_inspect, cli_paper, cli_search
from natgrad_lab.arguments import (
    OPTIMIZERS,
    Refused,
    check_positive,
    check_task,
    load,
    optimizer_names,
    output_folder,
    refusing,
    set_threads,
    warn,
)

if TYPE_CHECKING:  # torch takes seconds to import: `natgrad --help` does without
    from natgrad_lab.records import Race

INTERRUPTED = 130  # 128 + SIGINT, the shell's convention

app = typer.Typer(
    name="natgrad",
    help="Second-order training for PyTorch: race optimisers, train with checkpoints, redo the papers' figures.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_paper.app)
app.command("search")(cli_search.search)
app.command()(cli_inspect.inspect)


class Activation(StrEnum):
    """Hidden units of the autoencoders."""

    tanh = "tanh"
    sigmoid = "sigmoid"


Data = Annotated[
    Path | None, typer.Option("--data", metavar="FOLDER", help="Folder with the data files (mnist, olivetti).")
]
Seed = Annotated[int, typer.Option(help="Of the initial parameters, the batch order and the optimisers.")]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads. Default: PyTorch's own choice.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Second-order training for PyTorch: race optimisers, train with checkpoints, redo the papers' figures."""
    if version:
        import torch

        import natgrad

        print(f"natgrad {natgrad.__version__} (torch {torch.__version__}, Python {sys.version.split()[0]})")
        raise typer.Exit


@app.command()
def race(
    task: Annotated[str, typer.Argument(metavar="TASK", help="curves, digits, mnist or faces.")] = "curves",
    optimizers: Annotated[
        str, typer.Option(metavar="A,B,…", help=f"Out of {', '.join(OPTIMIZERS)}.")
    ] = "kfac,adam,nesterov",
    seconds: Annotated[float, typer.Option(metavar="S", help="Seconds of updates for each optimiser.")] = 55.0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/race-TASK-DATE-TIME.")] = None,
    seed: Seed = 0,
    activation: Annotated[Activation, typer.Option(help="Hidden units of the network.")] = Activation.tanh,
    data: Data = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Race optimisers on one task, from the same start, for the same seconds: tables, plots, report.html.

    Ctrl-C ends the race early and keeps what was measured.
    """
    names = optimizer_names(optimizers)
    check_task(task)
    check_positive("--seconds", seconds)
    set_threads(threads)
    folder = output_folder(out or Path("runs") / f"race-{task}-{time.strftime('%Y%m%d-%H%M%S')}", "--out")
    console = Console(highlight=False)
    loaded = load(task, data, device, console)
    from natgrad_lab import race as racing
    from natgrad_lab.display import Bars

    total = seconds * len(names)
    console.print(f"Racing {', '.join(names)} for {seconds:g} s each, {total:g} s in all. Ctrl-C ends it early.")
    with Bars(names, seconds, console) as bars:
        result = racing.run(
            loaded, names, seconds=seconds, out=folder, seed=seed, activation=activation.value, observer=bars
        )
    _finish(result, folder, console)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if all(trace.end is not None and trace.end.reason in ("failed", "diverged") for trace in result.traces.values()):
        raise typer.Exit(1)


@app.command()
def train(
    task: Annotated[str | None, typer.Argument(metavar="TASK", help="curves, digits, mnist or faces.")] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(OPTIMIZERS)}.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/train-TASK-NAME-DATE-TIME.")] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Stop after S seconds of updates. Default: 60.")
    ] = None,
    updates: Annotated[int | None, typer.Option(metavar="K", help="Stop after K updates.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    save_every: Annotated[float, typer.Option(metavar="S", help="Seconds between checkpoints.")] = 30.0,
    seed: Annotated[int | None, typer.Option(help="Of parameters, batch order and optimiser. Default: 0.")] = None,
    activation: Annotated[Activation | None, typer.Option(help="Hidden units of the network. Default: tanh.")] = None,
    data: Data = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Train with one optimiser, with checkpoints; --resume continues after a kill at any moment.

    A continued run is the uninterrupted run, bit for bit, on the same machine with the same number of threads.
    """
    if seconds is not None:
        check_positive("--seconds", seconds)
    if updates is not None:
        check_positive("--updates", updates)
    check_positive("--save-every", save_every)
    if task is not None:
        check_task(task)
    if optimizer is not None:
        (optimizer,) = optimizer_names(optimizer, several=False)
    from natgrad_lab import train as training

    given = {"task": task, "optimizer": optimizer, "seed": seed, "activation": activation.value if activation else None}
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        if out is not None and out.resolve() != resume.resolve():
            raise Refused(
                "--out and --resume name different folders; a continued run stays where it is: leave --out away"
            )
        with refusing():
            before = training.Plan.read(resume)
        for name, value in given.items():
            if getattr(before, name) != value:
                raise Refused(
                    f"the run in {resume} has {name} {getattr(before, name)!r}, not {value!r}; "
                    "leave it out when resuming"
                )
        plan = training.continued(before, seconds, updates)
    else:
        if task is None or optimizer is None:
            missing = "TASK" if task is None else "--optimizer NAME"
            raise Refused(f"{missing} is missing: natgrad train TASK --optimizer NAME, or natgrad train --resume RUN")
        plan = training.Plan(
            task,
            optimizer,
            seconds=60.0 if seconds is None and updates is None else seconds,
            updates=updates,
            seed=seed or 0,
            activation=(activation or Activation.tanh).value,
        )
    set_threads(threads)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    wanted = resume or out or Path("runs") / f"train-{plan.task}-{plan.optimizer}-{stamp}"
    folder = output_folder(wanted, "--resume" if resume else "--out")
    console = Console(highlight=False)
    loaded = load(plan.task, data, device, console)
    with refusing():
        session = training.Session(loaded, plan, folder, resume=resume is not None, warn=warn)
    _train(session, save_every, console)


def _train(session: Any, save_every: float, console: Console) -> None:
    """Run a session, showing a line per evaluation, and say how to go on."""
    from natgrad_lab.display import count, number

    plan, folder = session.plan, session.folder
    until = " or ".join(
        [*([f"{plan.seconds:g} s"] if plan.seconds else []), *([f"{plan.updates} updates"] if plan.updates else [])]
    )
    start = session.runner.update
    console.print(
        f"Training {plan.task} with {plan.optimizer}, {f'from update {start} on, ' if start else ''}until {until}. "
        f"Ctrl-C stops and saves. In {folder}"
    )

    def show(e: Any) -> None:
        errors = f"training error {number(e.train_error):>7}  test error {number(e.test_error):>7}"
        console.print(f"{count(e.update):>7} updates  {e.seconds:7.1f} s  {errors}")

    result = session.run(save_every=save_every, evaluated=show)
    again = f"natgrad train --resume {folder}"
    if result.reason == "finished":
        console.print(f"Done. To go on: {again} --updates {2 * result.update}")
    elif result.reason == "interrupted":
        console.print(f"Stopped and saved after {result.update} updates. To go on: {again}")
        raise typer.Exit(INTERRUPTED)
    else:
        warn(
            f"{plan.optimizer} diverged: {result.message}. The last checkpoint is from before that; try a smaller "
            f"learning rate"
        )
        raise typer.Exit(1)


def _finish(result: "Race", folder: Path, console: Console) -> None:
    """Print the tables and write pictures and report, undisturbed by an impatient Ctrl-C."""
    from natgrad_lab import report
    from natgrad_lab.display import notes, tables, verdict
    from natgrad_lab.signals import ignored

    with ignored():
        for table in tables(result):
            console.print(table)
        for line in notes(result):
            console.print(line)
        console.print(verdict(result))
        path = report.write(result, folder)
        console.print(f"Report: {path}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (nothing but failures), 2 (bad input), 130 (Ctrl-C)."""
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        code = command(args=arguments, prog_name="natgrad", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Refused as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped by Ctrl-C", INTERRUPTED)
    except Exception as error:
        # Click's own usage errors: an unknown option, a word where a number belongs. Typer ships its own copy of click.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message().rstrip(".")
            if not message:  # no arguments: the help was printed
                return error.exit_code
            return _fail(f"{message}. See natgrad --help.", error.exit_code)
        raise


def _fail(message: str, code: int) -> int:
    print("natgrad: error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
