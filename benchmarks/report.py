"""How results are written: Markdown tables and `results/NAME.md`, the same as data in `results/NAME.json`."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from natgrad_lab.records import environment, finite

RESULTS = ROOT / "benchmarks" / "results"


def cell(value: Any) -> str:
    """Three significant digits, large numbers in full, a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_force(settings: Mapping[str, Any]) -> str:
    """K-FAC's settings as a list: the recipe's, and what the constructor made of them (τ's, T's, damping, decay)."""
    given = ", ".join(f"{key}={value}" for key, value in settings["arguments"].items()) or "all defaults"
    schedule = ", ".join(f"{key}={value}" for key, value in settings["batch_size"].items())
    lines = [f"- arguments: {given}", f"- batch size of the recipe: {schedule}, final=all"]
    return "\n".join([*lines, *(f"- {key}: `{value}`" for key, value in settings["in force"].items())])


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """As JSON, the innermost lists and mappings on one line each, to be read as tables; infinity and NaN are null."""
    text = json.dumps(finite(dict(record)), indent=1, allow_nan=False)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda row: " ".join(row.group().split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def save(
    name: str,
    title: str,
    parts: Sequence[str],
    record: Mapping[str, Any],
    *,
    command: str,
    settings: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Print the result and write it into `folder`.

    Args:
        name: Of the files.
        title: The heading.
        parts: Paragraphs and tables.
        record: The numbers behind them.
        command: What was typed.
        settings: Of the K-FAC that was measured (`Competitor.settings`).
        folder: Made if it does not exist.
    """
    machine = {key: value for key, value in environment().items() if key != "command"}
    where = f"torch {machine['torch']}, Python {machine['python']}, {machine['processor']}, {machine['threads']} thread"
    tail = [f"K-FAC's settings in force:\n\n{in_force(settings)}"] if settings else []
    tail.append(f"Command: `{command}` ({where}).")
    text = "\n\n".join([f"## {title}", *parts, *tail]) + "\n"
    data = {"command": command, **record, **({"kfac": settings} if settings else {}), "environment": machine}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", data)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
