"""What a product with the exact Fisher costs: one column, eight columns at once, eight columns one after the other.

The MNIST autoencoder on random data, float32; CPU-seconds of one thread, in units of one forward and backward pass of
the same batch: the least of a few measurements of each, taken in turn.
"""

import argparse
from typing import Any

import torch

from benchmarks.measure import cpu_seconds, in_turns, positive
from benchmarks.report import save, table
from natgrad import Bernoulli, Fisher
from natgrad_lab.models import ENCODERS, autoencoder

COLUMNS = 8
REPEATS = 6  # the first warms up; it can only be slower


def measure(batch: int, encoder: tuple[int, ...] = ENCODERS["mnist"]) -> dict[str, float]:
    """CPU-seconds by what was done."""
    generator = torch.Generator().manual_seed(0)
    model, likelihood = autoencoder(encoder, activation="tanh", seed=0), Bernoulli()
    x = torch.rand(batch, encoder[0], generator=generator)
    fisher = Fisher(model, likelihood, x)
    v = torch.randn(fisher.shape[0], COLUMNS, generator=generator)

    def forward_backward() -> None:
        model.zero_grad()
        likelihood.nll(model(x), x).backward()

    calls = {
        "forward + backward": forward_backward,
        "make the operator": lambda: Fisher(model, likelihood, x),
        "1 column": lambda: fisher @ v[:, 0],
        "1 quadratic form": lambda: fisher.quadratic_form(v[:, 0]),
        f"{COLUMNS} columns at once": lambda: fisher @ v,
        f"{COLUMNS} columns, one by one": lambda: [fisher @ column for column in v.T],
    }
    turns = {name: (lambda call=call: cpu_seconds(call)) for name, call in calls.items()}
    return {name: min(values) for name, values in in_turns(turns, REPEATS).items()}


def product_table(seconds: dict[str, float]) -> str:
    """Seconds, and multiples of one forward and backward pass."""
    unit = seconds["forward + backward"]
    return table(["", "seconds", "passes"], [[name, value, value / unit] for name, value in seconds.items()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive(int), default=1000, help="m (default: %(default)s)")


def save_products(name: str, title: str, seconds: dict[str, float], options: argparse.Namespace) -> None:
    """Write a table of seconds and passes on the MNIST autoencoder."""
    batch = options.batch_size
    introduction = (
        f"The MNIST autoencoder, m = {batch}, CPU-seconds of one thread. A pass is one forward and backward pass of "
        "the same batch."
    )
    record: dict[str, Any] = {"batch_size": batch, "seconds": seconds}
    parts = [introduction, product_table(seconds)]
    save(name, title, parts, record, command=options.command, folder=options.out)


def main(options: argparse.Namespace) -> None:
    save_products("fisher-products", "Products with the exact Fisher", measure(options.batch_size), options)
