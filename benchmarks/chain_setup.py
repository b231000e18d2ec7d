"""Setting up the block-tridiagonal F̂⁻¹ against inverting F̃, for the network of [KFAC, fig. 2].

Both from factors that are there already, with the same damping, in double precision, in turns, in CPU-seconds of one
thread: `kronecker_fisher(..., structure="block_tridiagonal").inverse(d)`, and `structure="full"`, whose inverse is that
of a dense matrix, by Cholesky. Once for the middle four layers, which the paper shows, once for all six. Nothing here
depends on the values: the network is not trained and its inputs are random.
"""

import argparse
import statistics
from typing import Any

import torch
from torch import nn

import natgrad as ng
from benchmarks.measure import cpu_seconds, in_turns, positive, say
from benchmarks.report import save, table
from natgrad_lab.recipes.kfac_network import CLASSES, make_model

TARGET = 0.1
SIDE, HIDDEN, CASES = 16, (20, 20, 20, 20, 20), 50
SHOWN = {"the middle 4 layers": (1, 2, 3, 4), "all 6 layers": (0, 1, 2, 3, 4, 5)}
DAMPING = 1e-2


def measure(name: str, *, blocks: int, hidden: tuple[int, ...] = HIDDEN) -> dict[str, Any]:
    """CPU-seconds of both, and the ratio of every turn."""
    generator = torch.Generator().manual_seed(0)
    model = make_model([SIDE**2, *hidden, CLASSES], seed=0).double()
    for i, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        layer.requires_grad_(i in SHOWN[name])
    x = torch.rand(CASES, SIDE**2, generator=generator, dtype=torch.float64)
    chain, full = (
        ng.kronecker_fisher(model, ng.Categorical(), x, structure=structure)
        for structure in ("block_tridiagonal", "full")
    )
    chain.inverse(DAMPING)  # the first call of a routine of LAPACK costs more
    seconds = in_turns(
        {
            "block-tridiagonal": lambda: cpu_seconds(lambda: chain.inverse(DAMPING)),
            "dense": lambda: cpu_seconds(lambda: full.inverse(DAMPING)),
        },
        blocks,
    )
    say(f"  {name}: dense {seconds['dense'][-1]:.2f} s")
    return {
        "layers": name,
        "parameters": full.shape[0],
        "seconds": {key: statistics.median(values) for key, values in seconds.items()},
        "ratio": [a / b for a, b in zip(seconds["block-tridiagonal"], seconds["dense"], strict=True)],
    }


def setup_table(rows: list[dict[str, Any]]) -> str:
    """Seconds, ratio, target."""
    header = ["network of figure 2", "parameters", "F̂⁻¹, s", "F̃⁻¹, dense, s", "ratio", "turns", "target", "met"]
    lines = []
    for row in rows:
        ratio = statistics.median(row["ratio"])
        seconds = row["seconds"]
        lines.append([row["layers"], row["parameters"], seconds["block-tridiagonal"], seconds["dense"], ratio])
        lines[-1] += [f"{min(row['ratio']):.2g}–{max(row['ratio']):.2g}", TARGET, ratio <= TARGET]
    return table(header, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=positive(int), default=3, help="turns (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    rows = [measure(name, blocks=options.blocks) for name in SHOWN]
    save(
        "chain-setup",
        "Setting up the block-tridiagonal inverse",
        [
            "CPU-seconds from the factors of the network of [KFAC, fig. 2] (256-20-20-20-20-20-10) to a damped inverse "
            "that can be applied: of $\\hat F$, by regressions and decompositions per pair of layers, and of "
            "$\\tilde F$ as a dense matrix, by Cholesky; double precision.",
            setup_table(rows),
        ],
        {"rows": rows},
        command=options.command,
        folder=options.out,
    )
