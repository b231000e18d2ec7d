"""`natgrad inspect TASK|CHECKPOINT`: the curvature of a network as a table and pictures."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from natgrad_lab.arguments import (
    TASKS,
    Refused,
    check_positive,
    check_task,
    load,
    output_folder,
    refusing,
    set_threads,
)

if TYPE_CHECKING:  # torch takes seconds to import: `natgrad --help` does without
    from natgrad_lab.inspection import Inspection

# Larger networks are inspected in single precision, on fewer cases and with fewer products with the exact inverse.
SMALL_UP_TO = 100_000  # parameters
ROWS, ROWS_OF_LARGE = 100, 20
SOLVES_OF_LARGE, ITERATIONS_OF_LARGE = 2, 50


def inspect(
    target: Annotated[
        str,
        typer.Argument(metavar="TASK|CHECKPOINT", help="curves, digits, mnist, faces; or a run of natgrad train."),
    ],
    rows: Annotated[
        int | None, typer.Option(metavar="N", help="Training cases to look at. Default: 100; 20 for large networks.")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(metavar="D", help="γ² of the inverses. Default: what K-FAC starts from.")
    ] = None,
    vectors: Annotated[int, typer.Option(metavar="N", help="Random vectors where matrices are too large.")] = 8,
    dense: Annotated[int, typer.Option(metavar="P", help="Dense matrices for at most P parameters.")] = 600,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/inspect-TARGET-DATE-TIME.")] = None,
    seed: Annotated[int, typer.Option(help="Of a task's initial parameters and of the random vectors.")] = 0,
    data: Annotated[Path | None, typer.Option("--data", metavar="FOLDER", help="Folder with the data files.")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads. Default: PyTorch's own choice.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Show the curvature of a task's initial network, or of the one in a checkpoint.

    Per layer the condition numbers of A and G, π, and the error of the block; for the whole network how far F̆, F̂ and
    EKFAC are from the exact Fisher matrix and their inverses from its inverse; spectra and matrices as pictures.
    """
    for option, value in (("--rows", rows), ("--vectors", vectors), ("--dense", dense)):
        if value is not None:
            check_positive(option, value)
    if damping is not None:
        check_positive("--damping", damping)
    set_threads(threads)
    console = Console(highlight=False)
    state: dict[str, Any] | None = None
    if Path(target).exists():
        state = _checkpoint(Path(target))
        task, label = state["plan"]["task"], f"{state['plan']['task']} after {state['runner']['update']} updates"
    else:
        if target not in TASKS and any(mark in target for mark in "/."):
            raise Refused(f"there is no checkpoint {target}; name a run of natgrad train, or one of {', '.join(TASKS)}")
        check_task(target)
        task, label = target, f"{target} before training"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = output_folder(out or Path("runs") / f"inspect-{task}-{stamp}", "--out")
    loaded = load(task, data, device, console)
    import torch

    from natgrad_lab import inspection

    plan = {"seed": seed, "activation": "tanh"} if state is None else state["plan"]
    model = loaded.make_model(seed=plan["seed"], activation=plan["activation"])
    if state is not None:
        with refusing():
            try:
                model.load_state_dict(state["runner"]["model"])
            except RuntimeError as error:
                raise Refused(f"{target} does not fit the network of {task}: {str(error).splitlines()[0]}") from error
    size = sum(p.numel() for p in model.parameters())
    small = size <= SMALL_UP_TO
    dtype = torch.float64 if small else torch.float32
    rows = min(rows or (ROWS if small else ROWS_OF_LARGE), len(loaded.x_train))
    model = model.to(loaded.x_train.device, dtype)
    x = loaded.x_train[torch.arange(rows) * len(loaded.x_train) // rows]
    with console.status("") as status:
        found = inspection.inspect(
            model,
            loaded.likelihood,
            x.to(dtype),
            damping=damping,
            probes=vectors,
            dense=dense,
            seed=seed,
            **({} if small else {"solves": SOLVES_OF_LARGE, "iterations": ITERATIONS_OF_LARGE}),
            advance=lambda what: status.update(f"{label}: {what} …"),
        )
    _show(found, label, folder, console)


def _checkpoint(path: Path) -> dict[str, Any]:
    from natgrad_lab import checkpoint

    if path.is_dir() and not any((path / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS)):
        raise Refused(f"there is no checkpoint in {path}; name the folder that natgrad train wrote, or a checkpoint.pt")
    with refusing():
        state = checkpoint.load(path, advice="train anew") if path.is_dir() else checkpoint.read(path)
        if "plan" not in state or "runner" not in state:
            raise Refused(f"{path} is no checkpoint of natgrad train")
        return state


def _show(found: "Inspection", label: str, folder: Path, console: Console) -> None:
    from natgrad_lab.figures import inspection as figures
    from natgrad_lab.inspection import KINDS, STRUCTURES
    from natgrad_lab.records import environment, write_json

    about = found.about
    console.print(escape(f"{label}: {about['parameters']} parameters, {about['rows']} cases"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("layer", no_wrap=True)
    headings = ("A", "G", "cond A", "cond G", "π", "error\nF̆", "error\nEKFAC")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in found.layers:
        conditions = (condition(layer.eigenvalues_a), condition(layer.eigenvalues_g))
        errors = (f"{layer.errors[name]:.3f}" for name in ("F̆", "EKFAC"))
        sizes = (str(layer.inputs), str(layer.outputs))
        table.add_row(escape(layer.name), *sizes, *conditions, f"{layer.pi:.2g}", *errors)
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("whole network", no_wrap=True)
    for heading in ("error of\nthe matrix", "of the inverse,\nfactored damping", "of the inverse,\nexact damping"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in STRUCTURES:
        errors = (found.errors[name].get(what) for what in ("matrix", *KINDS))
        table.add_row(name, *("–" if error is None else f"{error:.3f}" for error in errors))
    console.print(table)
    console.print(
        f"Errors are relative to the exact Fisher matrix, in the Frobenius norm, the inverses with damping "
        f"{about['damping']:.3g}. Whole network: from {about['errors from']}.",
        soft_wrap=True,
    )
    if about["change of the exact inverse"]:
        change = 100 * about["change of the exact inverse"]
        console.print(
            f"The exact inverse is from conjugate gradients; their second half changed it by {change:.2g} %.",
            soft_wrap=True,
        )
    if not found.window:
        console.print("No layer is small enough for pictures of its Fisher matrix; --dense sets the limit.")
    write_json(folder / "inspection.json", {**found.record(), "label": label, "environment": environment()})
    for path in figures.write(found, folder):
        console.print(f"Picture: {path}", soft_wrap=True)


def condition(eigenvalues: list[float]) -> str:
    """The largest over the smallest eigenvalue; ∞ where rounding hides the smallest."""
    largest, smallest = eigenvalues[0], eigenvalues[-1]
    return "∞" if smallest <= 1e-14 * largest else f"{largest / smallest:.2g}"
