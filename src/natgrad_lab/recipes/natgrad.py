"""Figures and tables of Pascanu & Bengio (2013) [NATGRAD]."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import natgrad as ng
from natgrad_lab.recipes import natgrad_comparison, natgrad_order
from natgrad_lab.recipes.base import Size, recipe
from natgrad_lab.recipes.run import Run

__all__ = ["natgrad_comparison", "natgrad_order"]  # figures 2, 4 and 5 and table 1; figure 3

# The error is Σ (x − r)², that is the nll of a Gaussian of this variance: all matrices are the curvature of just this.
VARIANCE = 0.5


class OneUnit(nn.Module):
    """The autoencoder r(x) = w·sigmoid(w x + b) − b, as printed; the parameters are [w, b]."""

    def __init__(self, theta: Float[Tensor, "2"]) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The reconstructions."""
        w, b = self.theta
        return w * torch.sigmoid(w * x + b) - b


@recipe(
    "natgrad-fig1",
    title="one hidden unit: paths of four methods",
    source="[NATGRAD, fig. 1]",
    full=Size(
        20,
        {
            "cases": 100,
            "steps": 100,
            "starts": [[2.0, -4.0], [-1.0, 3.0]],  # [w, b] at the places [1] and [3]
            "later": [2, 2],  # the places [2] and [4]: after so many steps of natural gradient
            # Sec. 8.4: learning rate and damping.
            "methods": {
                "gradient descent": [0.1, None],
                "natural gradient": [0.5, 0.01],
                "covariance": [1.0, 1.0],
                "Newton": [1.0, 1.0],
            },
            "window": [[-5.0, 6.0], [-6.0, 5.0]],  # of w and b
            "kl window": 3.0,
            "grid": 160,
        },
    ),
    quick=Size(2, {"steps": 12, "grid": 40}),
)
def figure_1(run: Run) -> None:
    """Paths on the error surface, and the KL surfaces around four places with the step that each method proposes."""
    c = run.configuration
    generator = torch.Generator().manual_seed(run.seed)
    x = torch.randn(c["cases"], 1, generator=generator, dtype=torch.float64)
    starts = [torch.tensor(start, dtype=torch.float64) for start in c["starts"]]
    paths = [run.part(f"paths from {start.tolist()}", lambda s=start: _paths(run, x, s)) for start in starts]
    natural = [torch.tensor(found["natural gradient"], dtype=torch.float64) for found in paths]
    places = [path[k] for path, later in zip(natural, c["later"], strict=True) for k in (0, later)]
    run.part("places", lambda: _places(run, x, places))
    _surfaces(run, x, places)


def proposal(x: Tensor, theta: Tensor, method: str, rate: float, damping: float | None) -> Float[Tensor, "2"]:
    """The step −rate (M + damping I)^{-1} ∇ of a method, with its M of all cases; gradient descent has none."""
    model, likelihood = OneUnit(theta), ng.Gaussian(variance=VARIANCE)
    (gradient,) = torch.autograd.grad(likelihood.nll(model(x), x), [model.theta])
    if method == "gradient descent":
        return -rate * gradient
    if method == "natural gradient":
        matrix = ng.Fisher(model, likelihood, x).to_dense()
    elif method == "covariance":
        matrix = ng.GradientCovariance(model, likelihood, x, x, centered=True).to_dense()
    else:
        matrix = ng.Hessian(model, likelihood, x, x).to_dense()
    return -rate * torch.linalg.solve(matrix + (damping or 0.0) * torch.eye(2).to(matrix), gradient)


@torch.no_grad()
def divergence(x: Tensor, theta: Tensor, other: Tensor) -> Float[Tensor, "..."]:
    """KL(p_θ || p_other), the mean over cases, for parameters `other` [..., 2]."""
    return (_outputs(x, other) - _outputs(x, theta)).square().mean(-1) / (2 * VARIANCE)


def _outputs(x: Tensor, theta: Float[Tensor, "... 2"]) -> Float[Tensor, "... cases"]:
    w, b = theta[..., :1], theta[..., 1:]
    return w * torch.sigmoid(w * x[:, 0] + b) - b


def _paths(run: Run, x: Tensor, start: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method, (rate, damping) in run.configuration["methods"].items():
        theta, path = start, [start.tolist()]
        for _ in range(run.configuration["steps"]):
            theta = theta + proposal(x, theta, method, rate, damping)
            path.append(theta.tolist())
        found[method] = path
    found["errors"] = {m: _error(x, torch.tensor(path[-1], dtype=x.dtype)).item() for m, path in found.items()}
    return found


def _error(x: Tensor, theta: Tensor) -> Tensor:
    return (_outputs(x, theta) - x[:, 0]).square().mean(-1)


def _places(run: Run, x: Tensor, places: list[Tensor]) -> dict[str, Any]:
    methods = run.configuration["methods"]
    steps = [{m: proposal(x, p, m, *settings).tolist() for m, settings in methods.items()} for p in places]
    return {"places": [p.tolist() for p in places], "steps": steps}


def _surfaces(run: Run, x: Tensor, places: list[Tensor]) -> None:
    """The error over the window, and the KL around each place, on grids [w, b]."""
    c = run.configuration

    def grid(w: list[float], b: list[float]) -> Tensor:
        axes = [torch.linspace(low, high, c["grid"], dtype=x.dtype) for low, high in (w, b)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)

    half = [-c["kl window"], c["kl window"]]
    surfaces = {"error": _error(x, grid(*c["window"]))}
    surfaces |= {f"KL {i}": divergence(x, p, p + grid(half, half)) for i, p in enumerate(places)}
    run.save("surfaces", {name: value.float() for name, value in surfaces.items()})
