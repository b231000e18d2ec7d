"""Checks of what the command line was given, before anything is measured, and the one kind of error that they raise."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:  # torch takes seconds to import: `natgrad --help` does without
    from natgrad_lab.data import Task

TASKS = ("curves", "digits", "mnist", "faces")
# Those of `natgrad_lab.optimizers`, which takes seconds to import; a test compares them.
OPTIMIZERS = (
    "kfac",
    "kfac-paper",
    "kfac-ekfac",
    "kfac-tridiagonal",
    "eigen-adam",
    "eigen-adam-bf16",
    "hessian-free",
    "krylov",
    "natural-gradient",
    "tonga",
    "acp",
    "centered",
    "prong",
    "adam",
    "nesterov",
    "adamw",
    "sgd",
    "muon",
    "soap",
)


class Refused(Exception):
    """Something the user can mend; its text is the one line to print."""


def load(task: str, folder: Path | None, device: str, console: Console) -> "Task":
    """Load a task's data onto a device."""
    if folder is not None and not folder.is_dir():
        raise Refused(f"the data folder {folder} does not exist; --data takes the folder that holds mnist or olivetti")
    from dataclasses import replace

    import torch

    from natgrad_lab import data

    with refusing():
        with console.status(f"Loading {task} …"):
            loaded = data.load(task, folder=folder)
        check_device(device)
        place = torch.device(device)
        if place.type == "cpu":
            return loaded
        x_train, x_test = loaded.x_train.to(place), loaded.x_test.to(place)
        return replace(
            loaded,
            x_train=x_train,
            x_test=x_test,
            y_train=x_train if loaded.y_train is loaded.x_train else loaded.y_train.to(place),
            y_test=x_test if loaded.y_test is loaded.x_test else loaded.y_test.to(place),
        )


def check_device(name: str) -> None:
    """Refuse a device that is unknown or not there."""
    import torch

    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"the device {name!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error


def check_task(name: str) -> None:
    """Refuse an unknown task by name, with the nearest known one."""
    if name not in TASKS:
        from natgrad_lab.optimizers import unknown

        raise Refused(unknown("task", name, TASKS))


def optimizer_names(text: str, several: bool = True) -> list[str]:
    """Known optimisers of a comma-separated list, each once."""
    from natgrad_lab.optimizers import check_name

    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip())) if several else [text.strip()]
    if not names:
        raise Refused("--optimizers is empty; name one or more, for example --optimizers kfac,adam")
    with refusing():
        return [check_name(name) for name in names]


def check_positive(option: str, value: float) -> None:
    """Refuse zero, negative, infinite and NaN."""
    if not 0 < value < float("inf"):
        raise Refused(f"{option} is {value:g}; it must be a positive number")


def set_threads(threads: int | None) -> None:
    """Set PyTorch's number of threads, if one was given."""
    if threads is None:
        return
    if threads < 1:
        raise Refused(f"--threads is {threads}; it must be at least 1")
    import torch

    torch.set_num_threads(threads)


def output_folder(folder: Path, option: str) -> Path:
    """Make the folder and make sure that it can be written to, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(
            f"cannot write to the output folder {folder} ({error.strerror}); choose another with {option}"
        ) from error
    return folder


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what data, recipes and checkpoints raise for bad input into one line.

    Wrapped around preparation alone: a fault of ours, later, keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


def warn(message: str) -> None:
    """One line on the error stream; the run goes on."""
    print(f"natgrad: warning: {message}", file=sys.stderr)
