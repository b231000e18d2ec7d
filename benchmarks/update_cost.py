"""What one K-FAC update costs, in units of one update of Nesterov SGD at the same batch size.

CPU-seconds of one thread. K-FAC with its block-diagonal and its block-tridiagonal inverse, torch's SGD (fused,
Nesterov), natgrad's NesterovSGD and the same update by hand (forward, backward, fused kernel) take turns of T₃ updates
each, on fresh rows at every update; gathering them is outside every clock. The first updates, with their extra
refreshes of the inverses, are left out. The ratio is that of the CPU-seconds of a block of turns; the table has the
median of the blocks and their range.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import cpu_seconds, enter, in_turns, load_all, positive, say
from benchmarks.report import save, table
from natgrad_lab.runner import Batches

CASES: tuple[tuple[str, int, float, float], ...] = (
    ("curves", 1000, 1.7, 1.5),
    ("mnist", 1000, 1.95, 1.7),
    ("curves", 4000, 1.45, 1.3),
)  # task, m, target, goal
SGD_TARGET = 1.05
TRIDIAGONAL = {("curves", 1000): 2.3, ("curves", 4000): 1.7}  # targets of the block-tridiagonal inverse
WARM_UP = 2  # periods
PERIODS = 2  # of a block
Step = Callable[[Tensor, Tensor], object]


def first_order(task: Any, update: Callable[[nn.Module], Callable[[], object]]) -> Step:
    """Forward, backward and what `update` makes of the model."""
    model = task.make_model(seed=0, activation="tanh")
    move = update(model)

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        task.likelihood.nll(model(x), y).backward()
        move()

    return step


def torch_sgd(model: nn.Module) -> Callable[[], object]:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True).step


def by_hand(model: nn.Module) -> Callable[[], object]:
    """The fused kernel alone, without an optimiser around it."""
    parameters: list[Tensor] = list(model.parameters())
    buffers = [torch.zeros_like(p) for p in parameters]

    def move() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        with torch.no_grad():
            torch._fused_sgd_(
                parameters,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=0.9,
                lr=1e-3,
                dampening=0.0,
                nesterov=True,
                maximize=False,
                is_first_step=False,
            )

    return move


def measure(task: Any, m: int, *, blocks: int = 5) -> tuple[dict[str, Any], dict[str, Any]]:
    """CPU-seconds of one update of each, their ratios by block, and the settings of K-FAC."""
    kfac = enter("kfac", task)
    period = period_of(kfac.optimizer)
    steps: dict[str, Step] = {
        "kfac": kfac.step,
        "kfac-tridiagonal": enter("kfac-tridiagonal", task).step,
        "sgd": first_order(task, torch_sgd),
        "nesterov": enter("nesterov", task).step,
        "by hand": first_order(task, by_hand),
    }
    timed = turns(task, m, steps, period)
    in_turns(timed, WARM_UP)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(blocks):
        for name, values in in_turns(timed, PERIODS).items():
            seconds[name].append(statistics.mean(values))
        say(f"  {task.name}, m = {m}: block {number + 1} of {blocks}, K-FAC {seconds['kfac'][-1]:.3f} s")
    row = {
        "task": task.name,
        "m": m,
        "updates_of_a_block": PERIODS * period,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "kfac / sgd": _ratios(seconds, "kfac", "sgd"),
        "kfac-tridiagonal / sgd": _ratios(seconds, "kfac-tridiagonal", "sgd"),
        "nesterov / by hand": _ratios(seconds, "nesterov", "by hand"),
    }
    return row, kfac.settings


def turns(task: Any, m: int, steps: Mapping[str, Step], period: int) -> dict[str, Callable[[], float]]:
    """Per optimiser, what makes a turn of `period` updates on fresh rows and returns CPU-seconds per update."""
    batches = Batches(len(task.x_train), seed=0)

    def turn(step: Step) -> Callable[[], float]:
        def several() -> float:
            seconds = 0.0
            for _ in range(period):
                x = task.x_train[batches.next(m)]
                seconds += cpu_seconds(lambda x=x: step(x, x))
            return seconds / period

        return several

    return {name: turn(step) for name, step in steps.items()}


def period_of(optimizer: Any) -> int:
    """Updates after which all of K-FAC's work has come round: T₃, T₁ and, if it has a γ rule, T₂."""
    rules = (optimizer.damping.rule, optimizer.damping.gamma)
    return math.lcm(optimizer.periods.inverses, *(rule.every for rule in rules if rule is not None))


def _ratios(seconds: dict[str, list[float]], a: str, b: str) -> list[float]:
    return [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]


def cost_table(rows: list[dict[str, Any]]) -> str:
    """K-FAC against SGD, beside target and goal."""
    wanted = {(name, m): (target, goal) for name, m, target, goal in CASES}
    header = ["network", "m", "K-FAC, s", "SGD, s", "ratio", "blocks", "target", "met", "goal", "met"]
    lines = []
    for row in rows:
        ratio = statistics.median(row["kfac / sgd"])
        marks = [part for w in wanted.get((row["task"], row["m"]), (None, None)) for part in (w, w and ratio <= w)]
        seconds = row["seconds"]
        lines.append(
            [row["task"], row["m"], seconds["kfac"], seconds["sgd"], ratio, ratio_range(row["kfac / sgd"]), *marks]
        )
    return table(header, lines)


def tridiagonal_table(rows: list[dict[str, Any]]) -> str:
    """K-FAC with the block-tridiagonal inverse against SGD, beside the target."""
    header = ["network", "m", "block-tridiagonal, s", "SGD, s", "ratio", "blocks", "target", "met"]
    lines = []
    for row in rows:
        seconds, ratios, target = (
            row["seconds"],
            row["kfac-tridiagonal / sgd"],
            TRIDIAGONAL.get((row["task"], row["m"])),
        )
        ratio = statistics.median(ratios)
        line = [row["task"], row["m"], seconds["kfac-tridiagonal"], seconds["sgd"], ratio, ratio_range(ratios)]
        lines.append([*line, target, target and ratio <= target])
    return table(header, lines)


def sgd_table(rows: list[dict[str, Any]]) -> str:
    """natgrad's NesterovSGD against the same update by hand."""
    header = ["network", "m", "NesterovSGD, s", "by hand, s", "ratio", "blocks", "target", "met"]
    lines = []
    for row in rows:
        seconds, ratios = row["seconds"], row["nesterov / by hand"]
        ratio = statistics.median(ratios)
        lines.append([row["task"], row["m"], seconds["nesterov"], seconds["by hand"], ratio, ratio_range(ratios)])
        lines[-1] += [SGD_TARGET, ratio <= SGD_TARGET]
    return table(header, lines)


def ratio_range(values: list[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):.2f}–{max(values):.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default="curves,mnist", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive(int), help="measure this m alone (default: 1000, and 4000 on curves)"
    )
    parser.add_argument(
        "--blocks", type=positive(int), default=5, help="blocks, of 2 T₃ updates each (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> None:
    rows, settings = [], {}
    for task in load_all(options.tasks):
        sizes = [m for name, m, *_ in CASES if name == task.name] or [1000]
        for m in [options.batch_size] if options.batch_size else sizes:
            row, settings = measure(task, m, blocks=options.blocks)
            rows.append(row)
    save(
        "update-cost",
        "Cost of one update",
        [
            "CPU-seconds of one update, K-FAC relative to Nesterov SGD (`torch.optim.SGD`, fused) on the same number "
            "of fresh rows: the median of the blocks, and their range. A block has whole periods of K-FAC's refreshes.",
            cost_table(rows),
            "The same with the block-tridiagonal inverse:",
            tridiagonal_table(rows),
            "natgrad's `NesterovSGD` relative to forward, backward and the fused kernel called by hand:",
            sgd_table(rows),
        ],
        {"rows": rows},
        command=options.command,
        settings=settings,
        folder=options.out,
    )
