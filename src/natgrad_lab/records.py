"""Runs are records: one JSON object a line, written while the run goes on, read back by tables, plots and reports.

A race's file holds one record of kind "race" (the configuration), then "evaluation" records of all optimisers as they
come, then one "end" per optimiser. Numbers that are not finite are written as null. A last line cut short by a kill is
ignored.
"""

import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Evaluation:
    """The state of one optimiser at one moment of its own clock.

    `train_error` is the better of the iterate's and the running average's error on the fixed training subset;
    `test_error` belongs to the same parameters (the choice never looks at test data). `loss` is the mini-batch loss
    before the last update.
    """

    optimizer: str
    update: int
    examples: int
    seconds: float
    cpu_seconds: float
    batch_size: int
    loss: float
    train_error: float
    iterate_error: float
    average_error: float
    test_error: float


@dataclass(frozen=True)
class End:
    """How one optimiser's run ended.

    `reason` is "finished", "diverged", "failed" or "interrupted". The errors are those of the last parameters on the
    whole training and test sets, NaN where they were not measured.
    """

    optimizer: str
    reason: str
    message: str
    update: int
    examples: int
    seconds: float
    cpu_seconds: float
    train_error: float = math.nan
    test_error: float = math.nan
    peak_bytes: int | None = None


@dataclass
class Trace:
    """Everything recorded of one optimiser."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    end: End | None = None

    def first_at(self, error: float) -> Evaluation | None:
        """The first evaluation whose training error is at most `error`: nothing is interpolated."""
        return next((e for e in self.evaluations if e.train_error <= error), None)

    @property
    def last(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def train_error(self) -> float:
        """The final training error: on the whole set if it was measured, else on the subset."""
        return self._final("train_error")

    @property
    def test_error(self) -> float:
        """The final test error, of the same parameters as `train_error`."""
        return self._final("test_error")

    def _final(self, name: str) -> float:
        if self.end is not None and math.isfinite(getattr(self.end, name)):
            return getattr(self.end, name)
        return getattr(self.last, name) if self.last is not None else math.nan


@dataclass
class Race:
    """A race read back from its records: the configuration and one trace per optimiser, in starting order."""

    configuration: dict[str, Any]
    traces: dict[str, Trace]

    @property
    def interrupted(self) -> bool:
        """Whether some optimiser did not get all of its seconds."""
        return any(t.end is None or t.end.reason == "interrupted" for t in self.traces.values())

    @classmethod
    def read(cls, path: Path) -> "Race":
        """Read a race's JSON lines.

        Raises:
            ValueError: the file holds no race.
        """
        lines = read_lines(path)
        header = next((r for r in lines if r.get("kind") == "race"), None)
        if header is None:
            raise ValueError(f"{path} holds no race: its first line should be a record of kind 'race'")
        traces = {name: Trace(name, settings) for name, settings in header["optimizers"].items()}
        for record in lines:
            if record.get("kind") == "evaluation":
                traces[record["optimizer"]].evaluations.append(from_record(Evaluation, record))
            elif record.get("kind") == "end":
                traces[record["optimizer"]].end = from_record(End, record)
        return cls({k: v for k, v in header.items() if k != "kind"}, traces)


class JsonLines:
    """Appends records to a file, each flushed as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the length of the run

    def write(self, kind: str, record: Any) -> None:
        """Append one record: a dataclass instance or a mapping."""
        plain = dict(record) if isinstance(record, dict) else asdict(record)
        self._file.write(json.dumps(finite({"kind": kind, **plain}), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; an incomplete last line (a run killed while writing) is left out.

    Raises:
        ValueError: a line in the middle is no JSON object.
    """
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: it was never finished
                break
            raise ValueError(f"{path}, line {number}, is not a JSON record; remove that line and try again") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object; remove that line and try again")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object; the file appears whole or not at all."""
    replace_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """The same nested value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def from_record(kind: type, record: dict[str, Any]) -> Any:
    """An `Evaluation` or `End` from its record; null becomes NaN."""
    values = {f.name: record[f.name] for f in fields(kind) if f.name in record}
    return kind(**{k: math.nan if v is None and k != "peak_bytes" else v for k, v in values.items()})


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the configuration: versions, machine, threads."""
    import natgrad

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "natgrad": natgrad.__version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["natgrad", *sys.argv[1:]]) if Path(sys.argv[0]).name.startswith("natgrad") else None,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
