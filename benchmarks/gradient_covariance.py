"""What a step of TONGA costs, and what inner products of gradients cost from a and g instead of written out.

The MNIST autoencoder on random data, float32; CPU-seconds of one thread, in units of one forward and backward pass of
the same batch: the least of a few measurements of each, taken in turn.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.fisher_products import save_products
from benchmarks.measure import cpu_seconds, in_turns, positive
from natgrad import TONGA, Bernoulli, PastGradients
from natgrad.curvature.gradient_rows import LinearRows
from natgrad.curvature.per_example import PerExampleGradients
from natgrad.model_view import ModelView
from natgrad_lab.models import ENCODERS, autoencoder

GRADIENTS = 32  # written out: 360 MB on the MNIST network
FEW = 64  # of a batch, beside those of the past
REPEATS = 4  # the first warms up; it can only be slower


def measure(batch: int, encoder: tuple[int, ...] = ENCODERS["mnist"]) -> dict[str, float]:
    """CPU-seconds by what was done."""
    model, likelihood = autoencoder(encoder, activation="tanh", seed=0), Bernoulli()
    x = torch.rand(batch, encoder[0], generator=torch.Generator().manual_seed(0))
    optimizer = TONGA(model, likelihood, lr=1e-6)
    past = PastGradients()
    remembering = TONGA(model, likelihood, lr=1e-6, gradients=FEW, past=past)
    collect = PerExampleGradients(ModelView(model))
    few = collect(likelihood, x[:GRADIENTS], x[:GRADIENTS]).rows

    def forward_backward() -> None:
        model.zero_grad()
        likelihood.nll(model(x), x).backward()

    def written_out() -> Tensor:
        layers = [block for block in few.blocks if isinstance(block, LinearRows)]
        weights = [torch.einsum("nto,nti->noi", block.g, block.a).flatten(1) for block in layers]
        rows = torch.cat([*weights, *(block.g.sum(1) for block in layers)], 1)
        return rows @ rows.T

    calls = {
        "forward + backward": forward_backward,
        "per-example gradients": lambda: collect(likelihood, x, x),
        "TONGA's step": lambda: optimizer.step(x, x),
        f"the same, {FEW} gradients and {past.rank} of the past": lambda: remembering.step(x, x),
        f"inner products of {len(few)} gradients": few.gram,
        f"the same {len(few)} written out": written_out,
    }
    turns = {name: (lambda call=call: cpu_seconds(call)) for name, call in calls.items()}
    return {name: min(values) for name, values in in_turns(turns, REPEATS).items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive(int), default=250, help="m (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    save_products("gradient-covariance", "The covariance of gradients", measure(options.batch_size), options)
