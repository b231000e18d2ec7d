"""`natgrad paper list | run | plot`: every figure and table of the source documents by one command each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from natgrad_lab.arguments import Refused, check_device, output_folder, refusing, set_threads

if TYPE_CHECKING:  # torch takes seconds to import: `natgrad --help` does without
    from natgrad_lab.recipes import Recipe
    from natgrad_lab.recipes.run import Bar, Record

INTERRUPTED = 130

app = typer.Typer(
    name="paper",
    help="Figures and tables of the source documents: list them, run one, plot its record.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As natgrad paper list shows it, such as kfac-fig2.")]
Quick = Annotated[bool, typer.Option("--quick", help="The small size: seconds, on the digits of scikit-learn.")]


@app.command("list")
def list_recipes() -> None:
    """All figures and tables, with the time that each takes on two cores."""
    from natgrad_lab.recipes.base import all_recipes

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    table.add_column("quick", justify="right", no_wrap=True)
    table.add_column("full", justify="right", no_wrap=True)
    for name, recipe in all_recipes().items():
        table.add_row(name, escape(recipe.title), duration(recipe.quick.seconds), duration(recipe.full.seconds))
    console = Console(highlight=False)
    console.print(table)
    console.print("natgrad paper run NAME [--quick], then natgrad paper plot NAME", highlight=False)


@app.command("run")
def run_recipe(
    name: Name,
    quick: Quick = False,
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/paper/NAME, or NAME-quick.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Start over: what the folder holds is lost.")] = False,
    data: Annotated[Path | None, typer.Option("--data", metavar="FOLDER", help="Folder with the data files.")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads. Default: PyTorch's own choice.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Compute one figure or table and write its record, picture and comparison.

    Ctrl-C keeps the parts that are done; the same command goes on from there.
    """
    recipe = _find(name)
    name = recipe.name
    if data is not None and not data.is_dir():
        raise Refused(f"the data folder {data} does not exist; --data takes the folder that holds mnist or olivetti")
    set_threads(threads)
    check_device(device)
    folder = output_folder(out or default_folder(name, quick), "--out")
    from natgrad_lab.recipes.run import Run, clear

    if again:
        clear(folder)
    console = Console(highlight=False)
    with refusing():
        run = Run(recipe, folder, quick=quick, seed=seed, data=data, device=device, bar=_bars(console))
    if run.finished:
        console.print(f"{folder} holds this run already; --again computes it anew.", soft_wrap=True)
    else:
        size = "quick" if quick else "full"
        seconds = duration((recipe.quick if quick else recipe.full).seconds)
        done = f"; parts done: {len(run.results)}" if run.results else ""
        console.print(escape(f"{recipe.source} {recipe.title}: {size} size, about {seconds}{done}."), soft_wrap=True)
    from natgrad_lab.files import DataError

    try:
        record = run.execute()
    except DataError as error:
        raise Refused(str(error)) from error
    except KeyboardInterrupt:
        console.print(f"Stopped; finished parts that are kept: {len(run.results)}. The same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    _draw(record, folder, console)


@app.command("plot")
def plot_recipe(
    name: Name,
    quick: Quick = False,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="DIR", help="The run's folder. Default: as for run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: the run's folder.")] = None,
) -> None:
    """Draw the picture of a finished run from its record, and print ours beside the paper's."""
    name = _find(name).name
    from natgrad_lab.recipes.run import RECORD, Record

    place = record or default_folder(name, quick)
    if not (place / RECORD).exists():
        size = " --quick" if quick else ""
        other = default_folder(name, not quick)
        hint = f" (there is one of the other size in {other})" if (other / RECORD).exists() else ""
        raise Refused(f"there is no record in {place}{hint}; make it with natgrad paper run {name}{size}")
    with refusing():
        found = Record.read(place)
        if found.name != name:
            raise Refused(f"{place} holds a run of {found.name}, not of {name}")
        folder = output_folder(out or place, "--out")
        _draw(found, folder, Console(highlight=False))


def _draw(record: "Record", folder: Path, console: Console) -> None:
    from natgrad_lab.figures import drawing
    from natgrad_lab.signals import ignored

    with ignored():
        drawn = drawing.draw(record)
        if drawn.rows:
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
            table.add_column("")
            table.add_column("paper", justify="right")
            table.add_column("here", justify="right")
            for row in drawn.rows:
                table.add_row(*(escape(cell) for cell in row))
            console.print(table)
        if record.quick:
            console.print(f"This is the {drawing.QUICK}.", soft_wrap=True)
        for path in drawing.write(record, drawn, folder):
            if path.suffix == ".png":
                console.print(f"Picture: {path}", soft_wrap=True)


def default_folder(name: str, quick: bool) -> Path:
    """Where a run is kept unless --out says otherwise."""
    return Path("runs") / "paper" / (name + ("-quick" if quick else ""))


def duration(seconds: float) -> str:
    """A time in the unit that fits it: 12 s, 5 min, 3 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5700 else f"{seconds / 3600:.0f} h"


def _find(name: str) -> "Recipe":
    with refusing():
        from natgrad_lab.recipes.base import find

        return find(name)


def _bars(console: Console) -> "Bar":
    """One progress bar per label; where the output is no terminal, a line at the start of each."""

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Callable[[], None]]:
        if not console.is_terminal:
            console.print(label)
            yield lambda: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, expand=True) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda: progress.advance(task)

    return bar
