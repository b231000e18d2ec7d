"""The page docs/benchmarks.md: an introduction and the tables of the last runs, none of them copied by hand."""

import argparse
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.names import results

PAGE = ROOT / "docs" / "benchmarks.md"
INTRODUCTION = ROOT / "benchmarks" / "introduction.md"


def assemble(folder: Path) -> str:
    """The introduction, then what each benchmark has written, or that it has not been run."""
    parts = [INTRODUCTION.read_text(encoding="utf-8").strip()]
    for name in results():
        file = folder / f"{name}.md"
        parts.append(file.read_text(encoding="utf-8").strip() if file.exists() else f"## {name}\n\nNot measured yet.")
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write (default: docs/benchmarks.md)")


def main(options: argparse.Namespace) -> None:
    options.page.write_text(assemble(options.out), encoding="utf-8")
    print(options.page)
