"""The operation count of an update beside its measured time, in units of one update of SGD.

Counted: multiply-adds by [KFAC, sec. 8] with the settings in force, task by task (`natgrad.diagnostics`). Measured:
CPU-seconds of one thread, K-FAC and torch's SGD (fused, Nesterov) in turns, as in update-cost. What the measured ratio
has above the counted one is passes over memory, sampling, and products that run below the speed of large ones.
"""

import argparse
import math
import statistics
from collections.abc import Mapping
from typing import Any

from torch import nn

import natgrad as ng
from benchmarks.measure import enter, in_turns, load_all, positive, say
from benchmarks.report import save, table
from benchmarks.update_cost import PERIODS, WARM_UP, first_order, period_of, torch_sgd, turns
from natgrad.diagnostics import Operations, kfac_operations
from natgrad_lab.optimizers import check_name


def counted(optimizer: Any, m: int) -> Operations:
    """The count for a K-FAC optimiser with its settings, on a chain of linear layers."""
    layers = [layer for layer in optimizer.view.module.modules() if isinstance(layer, nn.Linear)]
    factors, curvature = optimizer.subsets.rows(m)
    held_out = min(curvature, m - curvature) if optimizer.guard is not None else 0
    gamma = optimizer.damping.gamma
    likelihood = optimizer.likelihood
    return kfac_operations(
        [(layer.in_features, layer.out_features) for layer in layers],
        m,
        tau1=factors / m,
        tau2=curvature / m,
        T1=1,  # ρ is there at every update, for the guard
        T2=None if gamma is None else gamma.every,
        T3=optimizer.periods.inverses,
        momentum=optimizer.momentum,
        structure=optimizer.structure,
        statistics_every=getattr(optimizer.periods, "statistics", 1),
        rho_share=(curvature + held_out) / m,
        diagonal_output=isinstance(likelihood, ng.Gaussian | ng.Bernoulli),
    )


def measure(task: Any, m: int, names: list[str], *, blocks: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counted and measured ratios by optimiser, and the settings of the first."""
    entered = {name: enter(name, task) for name in names}
    steps = {name: competitor.step for name, competitor in entered.items()}
    period = math.lcm(*(period_of(competitor.optimizer) for competitor in entered.values()))
    timed = turns(task, m, {**steps, "sgd": first_order(task, torch_sgd)}, period)
    in_turns(timed, WARM_UP)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number in range(blocks):
        seconds = {name: statistics.mean(values) for name, values in in_turns(timed, PERIODS).items()}
        for name in names:
            ratios[name].append(seconds[name] / seconds["sgd"])
        say(f"  {task.name}, m = {m}: block {number + 1} of {blocks}")
    row: dict[str, Any] = {"task": task.name, "m": m}
    for name, competitor in entered.items():
        count = counted(competitor.optimizer, m)
        row[name] = {"counted": count.relative(), "ratio counted": count.ratio, "ratio measured": ratios[name]}
    return row, entered[names[0]].settings


def operations_table(rows: list[dict[str, Any]]) -> str:
    """Tasks down, one column per network, m and optimiser; the totals and the measured ratio below."""
    columns = [(row, name) for row in rows for name in row if isinstance(row[name], Mapping)]
    header = ["in SGD updates", *(f"{row['task']}, m = {row['m']}, {name}" for row, name in columns)]
    tasks = list(columns[0][0][columns[0][1]]["counted"])
    lines: list[list[Any]] = [[task, *(row[name]["counted"][task] for row, name in columns)] for task in tasks]
    lines.append(["counted, all", *(row[name]["ratio counted"] for row, name in columns)])
    lines.append(["measured", *(statistics.median(row[name]["ratio measured"]) for row, name in columns)])
    return table(header, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default="curves", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--optimizers", default="kfac,kfac-ekfac,kfac-tridiagonal", help="K-FAC's entries (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive(int), default=1000, help="m (default: %(default)s)")
    parser.add_argument("--blocks", type=positive(int), default=3, help="blocks of turns (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    names = [check_name(name) for name in options.optimizers.split(",")]
    others = [name for name in names if not name.startswith("kfac")]
    if others:
        raise ValueError(f"--optimizers: the count is that of K-FAC; {', '.join(others)} is none of its entries")
    rows, settings = [], {}
    for task in load_all(options.tasks):
        row, settings = measure(task, options.batch_size, names, blocks=options.blocks)
        rows.append(row)
    save(
        "operations",
        "Operations of one update",
        [
            "Multiply-adds of one K-FAC update, task by task as in section 8 of Martens and Grosse (2015), in units of "
            "one update of SGD on the same batch; beside the sum the measured ratio of CPU-seconds (the median of the "
            "blocks).",
            operations_table(rows),
        ],
        {"rows": rows},
        command=options.command,
        settings=settings,
        folder=options.out,
    )
