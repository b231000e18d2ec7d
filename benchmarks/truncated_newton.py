"""Truncated-Newton steps: what a step costs beside its products, and what K-FAC saves as the solver's preconditioner.

The step: `NaturalGradient` with 20 iterations on the MNIST autoencoder, in units of 20 products with the same operator;
CPU-seconds of one thread, the least of a few measurements taken in turn. The preconditioner: CG on the damped metric of
the CURVES network after a few K-FAC updates, iterations to the same relative residual ‖b − A x‖ / ‖b‖, which is that of
the system itself, not of the preconditioned one.
"""

import argparse
from typing import Any

import torch

from benchmarks.measure import cpu_seconds, enter, in_turns, load, positive, say
from benchmarks.report import save, table
from natgrad import Bernoulli, Fisher, KroneckerPreconditioner, KrylovSolver, NaturalGradient
from natgrad.linalg import Progress, cg
from natgrad.model_view import ModelView
from natgrad.operators.chain import Chain
from natgrad.operators.chain_products import linearize
from natgrad.operators.damped import DampedSum
from natgrad_lab.models import ENCODERS, autoencoder

ITERATIONS = 20
REPEATS = 6  # the first warms up
STEP_TARGET = 1.1
PRECONDITIONERS = {
    "none": None,
    "K-FAC, exact damping": KroneckerPreconditioner("block_diagonal", kind="exact"),
    "K-FAC, factored damping": KroneckerPreconditioner("block_diagonal", kind="factored"),
    "EKFAC": KroneckerPreconditioner("ekfac"),
}
RESIDUALS = (0.1, 0.01, 0.001)
DAMPINGS = (0.1, 0.01, 0.001)
ITERATIONS_TARGET = 0.5


def step_cost(batch: int, encoder: tuple[int, ...] = ENCODERS["mnist"]) -> dict[str, float]:
    """CPU-seconds of a step with either solver, of as many products, and of a forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, encoder[0], generator=generator)
    likelihood = Bernoulli()
    model = autoencoder(encoder, activation="tanh", seed=0)
    view = ModelView(model)
    fisher = Fisher(view, likelihood, linearize(view, x, Chain.of(view)))
    operator = DampedSum(view, [lambda: fisher], [1.0], torch.tensor(1.0))
    v = torch.randn(view.num_parameters, generator=generator)
    calls: dict[str, Any] = {
        "forward + backward": lambda: likelihood.nll(model(x), x).backward(),
        f"{ITERATIONS} products": lambda: [operator @ v for _ in range(ITERATIONS)],
    }
    for name in ("cg", "minres_qlp"):
        solver = KrylovSolver(name, tol=0.0, max_iters=ITERATIONS)
        opt = NaturalGradient(autoencoder(encoder, activation="tanh", seed=0), likelihood, solver=solver, damping=1.0)
        calls[f"step, {name}"] = lambda opt=opt: opt.step(x, x)
    turns = {name: (lambda call=call: cpu_seconds(call)) for name, call in calls.items()}
    return {name: min(values) for name, values in in_turns(turns, REPEATS).items()}


def step_table(seconds: dict[str, float]) -> str:
    """Seconds, and multiples of the products."""
    unit = seconds[f"{ITERATIONS} products"]
    lines = []
    for name, value in seconds.items():
        target = STEP_TARGET if name.startswith("step") else None
        lines.append([name, value, value / unit, target, target and value / unit <= target])
    return table(["", "seconds", "of the products", "target", "met"], lines)


class History:
    """A rule that never stops the solver and notes every relative residual."""

    name, needs_model = "history", False

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, progress: Progress) -> bool:
        self.values.append(float(progress.residual_norm / progress.rhs_norm))
        return False

    def first_below(self, residual: float) -> int | None:
        return next((i for i, value in enumerate(self.values, start=1) if value <= residual), None)


def iterations(task: Any, batch: int, updates: int, damping: float, most: int) -> dict[str, dict[str, int | None]]:
    """Iterations of CG to each relative residual, by preconditioner, on a partially trained network."""
    competitor = enter("kfac", task)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        x = task.x_train[torch.randperm(len(task.x_train), generator=generator)[:batch]]
        competitor.step(x, x)
    x = task.x_train[torch.randperm(len(task.x_train), generator=generator)[:batch]]
    view, likelihood = ModelView(competitor.model), task.likelihood
    fisher = Fisher(view, likelihood, linearize(view, x, Chain.of(view)))
    operator = DampedSum(view, [lambda: fisher], [1.0], damping)
    loss = likelihood.nll(competitor.model(x), x)
    b = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(view.parameters.values()))])
    found: dict[str, dict[str, int | None]] = {}
    for name, made in PRECONDITIONERS.items():
        lam = torch.tensor(damping)
        preconditioner = None if made is None else made(view, likelihood, x, x, lam, torch.Generator().manual_seed(1))
        history = History()
        cg(operator, b, min(RESIDUALS), most, preconditioner, stop=history)
        found[name] = {f"{residual:g}": history.first_below(residual) for residual in RESIDUALS}
        say(f"  λ = {damping:.3g}, {name}: {found[name]}")
    return found


def iteration_table(found: dict[str, dict[str, int | None]]) -> str:
    """Iterations, and in brackets their share of those without a preconditioner."""
    lines = []
    for name, row in found.items():
        cells: list[Any] = [name]
        for residual in row:
            count, plain = row[residual], found["none"][residual]
            share = f" ({count / plain:.2f})" if count and plain and name != "none" else ""
            cells.append("–" if count is None else f"{count}{share}")
        lines.append(cells)
    return table(["preconditioner", *(f"to {residual:g}" for residual in RESIDUALS)], lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive(int), default=1000, help="m (default: %(default)s)")
    parser.add_argument("--updates", type=positive(int), default=40, help="of K-FAC first (default: %(default)s)")
    parser.add_argument("--max-iters", type=positive(int), default=300, help="of the solver (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    task = load("curves")
    seconds = step_cost(options.batch_size)
    say(f"  {seconds}")
    found = {
        damping: iterations(task, options.batch_size, options.updates, damping, options.max_iters)
        for damping in DAMPINGS
    }
    pieces: list[str] = []
    for damping, rows in found.items():
        pieces += [f"Iterations of CG at λ = {damping:g}, the share of those without a preconditioner in brackets:"]
        pieces += [iteration_table(rows)]
    save(
        "truncated-newton",
        "Truncated-Newton steps",
        [
            f"A step of `NaturalGradient` with {ITERATIONS} iterations on the MNIST autoencoder, m = "
            f"{options.batch_size}, CPU-seconds of one thread:",
            step_table(seconds),
            f"The preconditioner on the CURVES autoencoder after {options.updates} K-FAC updates, m = "
            f"{options.batch_size}; the target is a share of at most {ITERATIONS_TARGET:g}.",
            *pieces,
        ],
        {
            "batch_size": options.batch_size,
            "seconds": seconds,
            "iterations": {f"{damping:g}": rows for damping, rows in found.items()},
        },
        command=options.command,
        folder=options.out,
    )
