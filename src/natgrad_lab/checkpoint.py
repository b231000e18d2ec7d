"""Checkpoints that survive a kill at any moment.

A checkpoint is written beside its place, forced to the disk, and only then moved there; the one before is kept as
`checkpoint.previous.pt`. Reading verifies the checksum of every record of the file first and loads tensors and plain
values only.
"""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which file, what is wrong with it, what to try."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's current checkpoint; the current one becomes the previous one."""
    current, temporary = folder / NAME, folder / (NAME + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if current.exists():
        os.replace(current, folder / PREVIOUS)  # killed here: `load` finds the previous one
    os.replace(temporary, current)
    _sync_folder(folder)


def read(path: Path) -> dict[str, Any]:
    """One checkpoint file, verified.

    Raises:
        CheckpointError: it is missing, cut short, damaged, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # reads everything and compares each record's CRC-32
        if damaged is not None:
            raise CheckpointError(
                f"the checkpoint {path} is damaged: the checksum of its record {damaged!r} does not match"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged file makes zipfile, pickle and torch raise has no common type
        raise CheckpointError(f"the checkpoint {path} cannot be read ({_first_line(error)})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} is no checkpoint of natgrad train")
    return state


def load(
    folder: Path, warn: Callable[[str], None] = lambda message: None, advice: str = "start again without --resume"
) -> dict[str, Any]:
    """The newest readable checkpoint of a run's folder: the current one, else, with a warning, the one before it.

    Args:
        folder: The run's.
        warn: Called with the warning.
        advice: What to do where neither can be used.

    Raises:
        CheckpointError: neither can be used.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no run in {folder}: --resume takes the folder that an earlier natgrad train wrote (--out)"
        )
    try:
        return read(folder / NAME)
    except CheckpointError as error:
        try:
            state = read(folder / PREVIOUS)
        except CheckpointError as older:
            if not (folder / PREVIOUS).exists():
                raise CheckpointError(
                    f"{error}, and there is no earlier one in {folder}; check the path, or {advice}"
                ) from error
            raise CheckpointError(f"{error}; {older}; {advice}, into another folder") from error
        warn(f"{error}; continuing from the one before it, {PREVIOUS}")
        return state


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
