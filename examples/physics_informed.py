"""A physics-informed network trained by natural gradient: −u'' = f on (0, 1) with u(0) = u(1) = 0.

The network's output is no prediction of data but a function u; what the likelihood sees is z, the vector of residuals
−u''(x) − f(x) at some points, which `forward=` computes. With a Gaussian around 0 the loss is half the mean squared
residual and the metric its Gauss-Newton matrix, so that nothing but `forward=` is new. Adam gets the same seconds.

    python examples/physics_informed.py --seconds 20 --out physics-informed.png
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad as ng


def exact(x: Tensor) -> Tensor:
    """The solution: a slow and a fast wave."""
    return torch.sin(math.pi * x) + 0.3 * torch.sin(4 * math.pi * x)


def source(x: Tensor) -> Tensor:
    """f = −u'' of that solution."""
    return math.pi**2 * (torch.sin(math.pi * x) + 0.3 * 16 * torch.sin(4 * math.pi * x))


def make_model(width: int, seed: int) -> nn.Module:
    """Two hidden layers of tanh units, double precision: second derivatives ask for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        return nn.Sequential(*layers).double()


def u(model: nn.Module, x: Tensor) -> Tensor:
    """The network times x (1 − x), which is 0 on the boundary whatever the network says."""
    return x * (1 - x) * model(2 * x - 1)


def residuals(model: nn.Module, x: Tensor) -> Tensor:
    """z = −u''(x) − f(x): two forward-mode derivatives, through which the optimiser differentiates again."""

    def first(at: Tensor) -> Tensor:
        return torch.func.jvp(lambda t: u(model, t), (at,), (torch.ones_like(at),))[1]

    second = torch.func.jvp(first, (x,), (torch.ones_like(x),))[1]
    return -second - source(x)


def train(step: Callable[[Tensor], Tensor], points: int, seconds: float, steps: int | None) -> tuple[list, list]:
    """Losses and the seconds at which they were reached; fresh points for every step."""
    generator = torch.Generator().manual_seed(1)
    times, losses = [], []
    start = time.process_time()
    while time.process_time() - start < seconds and (steps is None or len(losses) < steps):
        x = torch.rand(points, 1, generator=generator, dtype=torch.float64)
        losses.append(float(step(x)))
        times.append(time.process_time() - start)
    return times, losses


def by_natural_gradient(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A step of `natgrad.NaturalGradient`."""
    # The residuals are of the order of 10, so that the curvature is of the order of 10²: so is the first damping.
    solver = ng.KrylovSolver("cg", tol=1e-4, max_iters=40)
    opt = ng.NaturalGradient(model, ng.Gaussian(), solver=solver, damping=100.0, forward=residuals)
    return lambda x: opt.step(x, torch.zeros_like(x))


def by_adam(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A step of Adam on the same loss."""
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    likelihood = ng.Gaussian()

    def step(x: Tensor) -> Tensor:
        opt.zero_grad()
        loss = likelihood.nll(residuals(model, x), torch.zeros_like(x))
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def error(model: nn.Module) -> float:
    """The relative error of u, root mean square over a grid."""
    x = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]
    with torch.no_grad():
        return float((u(model, x) - exact(x)).norm() / exact(x).norm())


def picture(path: Path, models: dict[str, nn.Module], runs: dict[str, tuple[list, list]]) -> None:
    """Both functions beside the exact one, and how the loss fell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    x = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]
    left.plot(x, exact(x), color="0.7", linewidth=4, label="exact")
    for (name, model), style in zip(models.items(), ("-", "--"), strict=True):
        left.plot(x, u(model, x).detach(), style, label=f"{name}, error {error(model):.1e}")
        times, losses = runs[name]
        right.semilogy(times, losses, style, label=name)
    left.set(xlabel="x", ylabel="u(x)")
    right.set(xlabel="CPU-seconds", ylabel="half the mean squared residual")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both, draw, and return the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU-seconds for each (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="at most so many steps")
    parser.add_argument("--width", type=int, default=24, help="hidden units of a layer (default: %(default)s)")
    parser.add_argument("--points", type=int, default=128, help="in a batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("physics-informed.png"))
    options = parser.parse_args(arguments)
    models: dict[str, nn.Module] = {}
    runs: dict[str, tuple[list, list]] = {}
    for name, make in (("natural gradient", by_natural_gradient), ("Adam", by_adam)):
        models[name] = make_model(options.width, seed=0)
        runs[name] = train(make(models[name]), options.points, options.seconds, options.steps)
        times, losses = runs[name]
        print(
            f"{name}: {len(losses)} steps in {times[-1]:.1f} s, loss {losses[-1]:.2e}, error {error(models[name]):.1e}"
        )
    picture(options.out, models, runs)
    print(options.out)
    return {name: error(model) for name, model in models.items()}


if __name__ == "__main__":
    main()
