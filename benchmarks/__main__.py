"""What natgrad must reach, measured: `python -m benchmarks --help`."""

import argparse
import importlib

import torch

NAMES = {"sweep": "sweep"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in NAMES.items():
        part = importlib.import_module(f"benchmarks.{module}")
        part.add_arguments(commands.add_parser(name, description=part.__doc__, help=(part.__doc__ or "").split("\n")[0]))
    options = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module(f"benchmarks.{NAMES[options.name]}").main(options)


main()
