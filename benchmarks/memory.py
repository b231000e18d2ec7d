"""Tensor memory of K-FAC and Adam at equal batch size, above the model, the data and the mini-batch.

Counted is every tensor that exists at the same time from the making of the optimiser to the end of its third update on
the CPU: gradients, the optimiser's state, what the forward and backward passes keep, and temporaries inside operators.
Not counted: parameters, data, the mini-batch itself (they are there before) and the scratch memory of numerical
libraries. The first three updates of K-FAC hold all of its state. Each measurement has a process of its own.

Where it goes on MNIST: K-FAC keeps the factors (22 MiB), their inverses of low rank (4 MiB) and the last update
(11 MiB), Adam two moments (22 MiB). Both have a gradient (11 MiB) and the inputs of the layers (14 MiB), K-FAC for a
moment the proposal in the place of these (11 MiB). A batch's factors go into the averages without being written out.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.measure import load, positive, say
from benchmarks.report import save, table
from natgrad_lab import optimizers
from natgrad_lab.memory import peak_bytes

TARGET = 1.5
UPDATES = 3
MIB = 2**20


def peak(task: Any, name: str, m: int) -> tuple[int, int, dict[str, Any]]:
    """Most bytes at a time, the bytes of the model and the training data, and the optimiser's settings."""
    model = task.make_model(seed=0, activation="tanh")
    before = sum(t.nbytes for t in (*model.parameters(), task.x_train))
    batches = [task.x_train[start : start + m].clone() for start in range(0, UPDATES * m, m)]
    made = []

    def updates() -> None:
        made.append(optimizers.make(name, task, model, seed=0))
        for x in batches:
            made[0].step(x, x)

    return peak_bytes(updates), before, made[0].settings


def alone(task: str, name: str, m: int) -> tuple[int, int, dict[str, Any]]:
    """`peak` in this process, which has done nothing else."""
    torch.set_num_threads(1)
    return peak(load(task), name, m)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """K-FAC's peak beside Adam's."""
    header = [
        "network",
        "m",
        "K-FAC, MiB",
        "Adam, MiB",
        "ratio",
        "at most",
        "met",
        "model and data, MiB",
        "ratio with these",
    ]
    lines = []
    for row in rows:
        kfac, adam, before = (row[key] / MIB for key in ("kfac", "adam", "before"))
        judged = [kfac / adam, TARGET, kfac / adam <= TARGET]
        lines.append([row["task"], row["m"], kfac, adam, *judged, before, (kfac + before) / (adam + before)])
    return table(header, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default="curves,mnist", help="comma-separated (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive(int), default=1000, help="m (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    spawn = multiprocessing.get_context("spawn")
    for task in options.tasks.split(","):
        row: dict[str, Any] = {"task": task, "m": options.batch_size}
        for name in ("adam", "kfac"):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                row[name], row["before"], settings = process.submit(alone, task, name, options.batch_size).result()
            say(f"  {task}, {name}: {row[name] / MIB:.1f} MiB")
        rows.append(row)
    save(
        "memory",
        "Memory",
        ["\n\n".join(" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[1:]), memory_table(rows)],
        {"rows": rows},
        command=options.command,
        settings=settings,
        folder=options.out,
    )
