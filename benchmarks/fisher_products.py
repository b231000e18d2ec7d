"""What a product with the exact Fisher costs: one column, eight columns at once, eight columns one after the other.

The MNIST autoencoder's widths on random data, float32, one thread; CPU seconds, in units of one forward and backward pass of
the same batch. Run ``python benchmarks/fisher_products.py``; an argument changes the batch size (default 1000).
"""

import itertools
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from natgrad import Bernoulli, Fisher

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
COLUMNS = 8
REPEATS = 5


def autoencoder() -> nn.Sequential:
    layers = [part for d, k in itertools.pairwise(WIDTHS) for part in (nn.Linear(d, k), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def cpu_seconds(tasks: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least of a few measurements of each task, taken in turn so that a busy machine disturbs all alike."""
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(REPEATS + 1):  # the first round warms up; it can only be slower
        for name, task in tasks.items():
            start = time.process_time()
            task()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main(batch: int = 1000) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, likelihood = autoencoder(), torch.rand(batch, WIDTHS[0]), Bernoulli()
    fisher = Fisher(model, likelihood, x)
    v = torch.randn(fisher.shape[0], COLUMNS)

    def forward_backward() -> None:
        model.zero_grad()
        likelihood.nll(model(x), x).backward()

    seconds = cpu_seconds(
        {
            "forward + backward": forward_backward,
            "make the operator": lambda: Fisher(model, likelihood, x),
            "1 column": lambda: fisher @ v[:, 0],
            "1 quadratic form": lambda: fisher.quadratic_form(v[:, 0]),
            f"{COLUMNS} columns at once": lambda: fisher @ v,
            f"{COLUMNS} columns, one by one": lambda: [fisher @ column for column in v.T],
        }
    )
    unit = seconds["forward + backward"]
    print(f"widths {'-'.join(map(str, WIDTHS))}, m = {batch}, torch {torch.__version__}, one thread")
    print(f"{'':26}{'seconds':>10}{'ratio':>10}")
    for name, value in seconds.items():
        print(f"{name:26}{value:10.3f}{value / unit:10.2f}")
    together, apart = seconds[f"{COLUMNS} columns at once"], seconds[f"{COLUMNS} columns, one by one"]
    print(f"at once / one by one: {together / apart:.2f}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
