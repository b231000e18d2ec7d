"""A run of a recipe, and the record that it leaves.

A run's folder holds `record.json` (configuration, seed, size, versions, and in `results` one entry per finished part),
tensors as `NAME.pt`, and in `parts/` whatever checkpoints long parts keep for themselves. Everything appears whole or
not at all. A run that was stopped continues with the parts that are missing.
"""

import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natgrad_lab.recipes.base import Recipe
from natgrad_lab.records import environment, finite, read_json, write_json
from natgrad_lab.signals import ignored

RECORD = "record.json"
FORMAT = "natgrad-paper-1"

PARTS = "parts"

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@contextmanager
def no_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows nothing."""
    yield lambda: None


class Run:
    """What a recipe works with.

    Args:
        recipe: The recipe.
        folder: The run's own folder (existing).
        quick: Which of the two sizes.
        seed: Of everything random that the configuration does not fix.
        data: Where MNIST and the like are; None: NATGRAD_DATA.
        device: Where to compute.
        bar: Shows progress: `bar(label, total)` is a context manager that yields a function to call after each step.

    Attributes:
        configuration: Everything that was chosen.
        finished: Whether nothing is missing.

    Raises:
        ValueError: the folder holds another run, or a record that cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        quick: bool = False,
        seed: int = 0,
        data: Path | None = None,
        device: str = "cpu",
        bar: Bar = no_bar,
    ) -> None:
        self.recipe, self.folder, self.quick, self.seed = recipe, folder, quick, seed
        self.data, self.device, self.bar = data, torch.device(device), bar
        self.configuration = recipe.configuration(quick)
        asked = {
            "format": FORMAT,
            "recipe": recipe.name,
            "quick": quick,
            "seed": seed,
            "configuration": finite(self.configuration),
        }
        path = folder / RECORD
        self._content: dict[str, Any]
        if path.exists():
            self._content = Record.read(folder).content
            differing = [key for key, value in asked.items() if self._content.get(key) != value]
            if differing:
                raise ValueError(
                    f"{folder} holds a run of {self._content.get('recipe')} with another {' and '.join(differing)}; "
                    "choose another folder with --out, or start over with --again"
                )
        else:
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            about = {"title": recipe.title, "source": recipe.source, "environment": environment(), "started": started}
            self._content = {**asked, **about, "seconds": 0.0, "finished": False, "results": {}}
            self._write()

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return self._content["finished"]

    @property
    def results(self) -> dict[str, Any]:
        """The finished parts by name."""
        return self._content["results"]

    def part(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """One part of the results: computed and recorded, or read back if an earlier session recorded it.

        Args:
            name: Unique within the run, as "seed 3" or "block-diagonal, m = 1000".
            compute: Returns plain values: numbers, words, lists, mappings. Tensors that it stores itself with `save`.

        Returns:
            What the record holds: numbers that are not finite have become None.
        """
        if name not in self.results:
            start = time.perf_counter()
            value = finite(dict(compute()))
            with ignored():
                self.results[name] = value
                self._content["seconds"] += time.perf_counter() - start
                self._write()
        return self.results[name]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as `NAME.pt` into the run's folder."""
        path = self.folder / f"{name}.pt"
        temporary = path.with_suffix(".tmp")
        torch.save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        os.replace(temporary, path)

    def place(self, name: str) -> Path:
        """A folder of its own for a long part that checkpoints itself, as `natgrad_lab.train.Session` does."""
        folder = self.folder / PARTS / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were saved, None where there are none (or a file that cannot be read)."""
        path = self.folder / f"{name}.pt"
        return read_tensors(path) if path.exists() else None

    def execute(self) -> "Record":
        """Compute what is missing.

        Raises:
            KeyboardInterrupt: at Ctrl-C; the parts that were finished are in the record.
        """
        if not self.finished:
            self.recipe.compute(self)
            self._content["finished"] = True
            self._write()
        return Record(self.folder, self._content)

    def _write(self) -> None:
        write_json(self.folder / RECORD, self._content)


def clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in [folder / RECORD, *folder.glob("*.pt")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


class Record:
    """A run read back.

    Attributes:
        folder: Where it is.
        content: `record.json`.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content = folder, content

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read a run's record.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        path = folder / RECORD
        content = read_json(path)
        if content.get("format") != FORMAT or not isinstance(content.get("results"), dict):
            raise ValueError(f"{path} is no record of natgrad paper run; remove it, or name another folder")
        return cls(folder, content)

    @property
    def name(self) -> str:
        """Of the recipe."""
        return self.content["recipe"]

    @property
    def quick(self) -> bool:
        """Whether it is of the quick size."""
        return self.content["quick"]

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return self.content["finished"]

    @property
    def configuration(self) -> dict[str, Any]:
        """Everything that was chosen."""
        return self.content["configuration"]

    @property
    def results(self) -> dict[str, Any]:
        """The parts by name."""
        return self.content["results"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors that the run saved.

        Raises:
            ValueError: they are missing or damaged.
        """
        return read_tensors(self.folder / f"{name}.pt")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, verified.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes zipfile, pickle and torch raise has no common type
        raise ValueError(f"{path} is missing or damaged; run the recipe again with --again") from error
