"""What natgrad must reach, measured.

Each name prints Markdown tables and writes them, with the numbers, the settings and the command, to
benchmarks/results. All times are CPU-seconds of one thread. MNIST is read from the folder that the environment
variable NATGRAD_DATA names.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.measure import say
from benchmarks.names import BENCHMARKS, runs
from benchmarks.report import RESULTS

NAMES = (*BENCHMARKS, "docs")
# The sweep is no part of `all`: it writes the settings of the baselines, which the others only read.
ALL = (*(words for name in BENCHMARKS if name != "sweep" for words in runs(name)), ["docs"])


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message.replace('argument NAME: ', '')}; see {self.prog} --help\n")


def parser() -> Parser:
    """The command line; each part adds its own options."""
    made = Parser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = made.add_subparsers(dest="name", required=True, metavar="NAME", parser_class=Parser)
    for name in NAMES:
        part = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        text = part.__doc__ or ""
        command = commands.add_parser(name, description=text, help=text.split("\n")[0])
        part.add_arguments(command)
        command.add_argument(
            "--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)"
        )
        command.set_defaults(main=part.main)
    commands.add_parser("all", help="Everything but the sweep, at full size, one after the other.")
    return made


def run(arguments: Sequence[str]) -> int:
    """One benchmark, or all; the exit code."""
    options = parser().parse_args(arguments)
    if options.name == "all":
        return max(run(part) for part in ALL)
    options.command = shlex.join(["python", "-m", "benchmarks", *arguments])
    try:
        options.main(options)
    except (
        ValueError,
        OSError,
    ) as problem:  # data that are missing, a name that is unknown, a folder without permission
        say(f"benchmarks {options.name}: {problem}")
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(sys.argv[1:]))
