"""What layers' factors cost: A and G of convolutions, and preconditioned steps of a CNN and a transformer.

Random data, float32, CPU-seconds of one thread: the least of a few measurements of each, taken in turn.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from benchmarks.measure import cpu_seconds, in_turns, positive
from benchmarks.report import save, table
from natgrad.layers.registry import block_of

# (examples, channels in, channels out, height and width), 3 x 3 kernels with padding
SHAPES = ((128, 3, 16, 32), (128, 16, 16, 32), (128, 32, 32, 16), (128, 64, 64, 8))
ROUNDS = 6  # the first warms up; it can only be slower


def convolution(examples: int, channels: int, out: int, size: int) -> dict[str, float]:
    """CPU-seconds by what was done, for one layer."""
    layer = nn.Conv2d(channels, out, 3, padding=1)
    x = torch.randn(examples, channels, size, size, requires_grad=True)
    g = torch.randn(examples, out, size, size)
    block, use, total = block_of("conv", layer), ng.layers.Use(layer, x.detach(), g.shape), torch.zeros(out, out)

    def unfolded() -> Tensor:
        rows = F.unfold(x.detach(), 3, padding=1).transpose(1, 2).reshape(-1, 9 * channels)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        return rows.T @ rows

    calls: dict[str, Callable[[], Any]] = {
        "forward + backward": lambda: torch.autograd.grad(layer(x), [layer.weight, layer.bias, x], g),
        "A": lambda: block.rule.input_sum(block, use),
        "G": lambda: block.rule.output_sum(block, use, g, total),
        "A by unfold": unfolded,
    }
    turns = {name: (lambda call=call: cpu_seconds(call)) for name, call in calls.items()}
    return {name: min(values) for name, values in in_turns(turns, ROUNDS).items()}


def cnn(width: int) -> nn.Module:
    """Three stages of 3 x 3 convolutions with batch normalisation."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for stage in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(before, stage, 3, 2 if before > 3 else 1, 1, bias=False), nn.BatchNorm2d(stage), nn.ReLU()]
        layers += [nn.Conv2d(stage, stage, 3, 1, 1, bias=False), nn.BatchNorm2d(stage), nn.ReLU()]
        before = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def transformer(width: int) -> nn.Module:
    """Two encoder layers of torch on an embedding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Embedding(64, width), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 64)
    )


def steps(make: Callable[[], nn.Module], x: Tensor, y: Tensor, renewal: ng.Renewal | None, count: int) -> float:
    """CPU-seconds of a training step, over so many."""
    model, likelihood = make(), ng.Categorical("element")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pre = ng.Preconditioner(model, likelihood, periods=renewal) if renewal is not None else None

    def step() -> None:
        optimizer.zero_grad()
        z = model(x)
        if pre is not None:
            pre.observe(z)
        likelihood.nll(z, y).backward()
        if pre is not None:
            pre.step()
        optimizer.step()

    step()  # everything is made
    return cpu_seconds(lambda: [step() for _ in range(count)]) / count


def measure(
    width: int, batch: int, count: int, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> dict[str, dict[str, dict[str, float]]]:
    """All numbers."""
    ids = torch.randint(64, (batch // 4 or 1, 64), generator=torch.Generator().manual_seed(0))
    tasks = {
        "CNN": (lambda: cnn(width), torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10),
        "transformer": (lambda: transformer(4 * width), ids, ids.roll(1, 1)),
    }
    rows = {
        "SGD": None,
        "statistics every 10, of 1/4 of the rows, inverses every 100": ng.Renewal(100, (1,), 10, rows=0.25),
        "the same, of 1/4 of the positions too": ng.Renewal(100, (1,), 10, rows=0.25, positions=0.25),
        "statistics every 10, of all rows, inverses every 100": ng.Renewal(100, (1,), 10),
        "everything at every step": ng.Renewal(1, (), 1),
    }
    found = {}
    for name, (make, x, y) in tasks.items():
        turns = {row: (lambda r=renewal: steps(make, x, y, r, count)) for row, renewal in rows.items()}  # noqa: B023
        found[name] = {row: min(values) for row, values in in_turns(turns, 4).items()}
    layers = {f"{n} x {c} x {s}², {o} out": convolution(n, c, o, s) for n, c, o, s in shapes}
    return {"layers": layers, "steps": found}


def layer_table(layers: dict[str, dict[str, float]]) -> str:
    """Multiples of one forward and backward pass of the layer."""
    rows = [
        [name, *(s[key] / s["forward + backward"] for key in ("A", "A by unfold", "G"))] for name, s in layers.items()
    ]
    return table(["input", "A", "A from unfolded rows and ones", "G"], rows)


def step_table(found: dict[str, dict[str, float]]) -> str:
    """Multiples of a step of SGD alone."""
    names = list(found)
    rows = [[row, *(found[name][row] / found[name]["SGD"] for name in names)] for row in found[names[0]]]
    return table(["", *names], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive(int), default=16, help="channels of the CNN (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive(int), default=128, help="examples (default: %(default)s)")
    parser.add_argument("--steps", type=positive(int), default=100, help="of each run (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    found = measure(options.width, options.batch_size, options.steps)
    save(
        "layer-cost",
        "Factors of layers",
        [
            "The factors of a 3 x 3 convolution, in units of one forward and backward pass of that layer.",
            layer_table(found["layers"]),
            f"A training step with `Preconditioner`, in units of a step of SGD alone: a CNN of {options.width} to "
            f"{4 * options.width} channels on 32 x 32 images, {options.batch_size} of them; a transformer of width "
            f"{4 * options.width}, {max(1, options.batch_size // 4)} sequences of 64; means of {options.steps} steps.",
            step_table(found["steps"]),
        ],
        {"settings": {"width": options.width, "batch_size": options.batch_size, "steps": options.steps}, **found},
        command=options.command,
        folder=options.out,
    )
