"""The network of [KFAC, figs. 2, 3, 5, 6]: a tanh classifier, trained for a few iterations of K-FAC in batch mode."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import to_dense
from natgrad.curvature.fisher import KroneckerCurvature
from natgrad.diagnostics import CumulantReport, block_means, cumulant_report
from natgrad_lab import labelled
from natgrad_lab.recipes.run import Run

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A trained network whose shown layers alone have gradients, and all training cases.

    Attributes:
        model: In float64.
        x, y: All training cases.
        gamma: γ of K-FAC at its last iteration.
    """

    model: nn.Sequential
    x: Tensor
    y: Tensor
    gamma: float

    def showing(self, layers: list[int] | None) -> "Network":
        """Only these layers (None: all) have gradients from now on."""
        for i, layer in enumerate(m for m in self.model if isinstance(m, nn.Linear)):
            layer.requires_grad_(layers is None or i in layers)
        return self

    def fisher(self) -> Float[Tensor, "size size"]:
        """The exact F of the shown layers, order "vec"."""
        return ng.Fisher(self.model, ng.Categorical(), self.x).to_dense(order="vec")

    def factored(self, structure: str = "full") -> KroneckerCurvature:
        """F̃ (or another structure) of the shown layers, with exact expectations."""
        return ng.kronecker_fisher(self.model, ng.Categorical(), self.x, structure=structure)

    def damped(self) -> Float[Tensor, "size size"]:
        """F̃ with the factored Tikhonov damping of γ on the factors of its diagonal blocks [KFAC, sec. 6.3]."""
        matrix = self.factored().to_dense(order="vec")
        start = 0
        for factors in self.factored("block_diagonal").factors.values():
            A, G = (to_dense(factor).clone() for factor in (factors.A, factors.G))
            for factor, added in zip((A, G), ng.FactoredTikhonov().split(A, G, self.gamma**2), strict=True):
                factor.diagonal().add_(added)
            block = torch.kron(A, G)
            stop = start + len(block)
            matrix[start:stop, start:stop] = block
            start = stop
        return matrix

    def block_inverse(self, structure: str) -> Float[Tensor, "size size"]:
        """The damped inverse of F̆ or F̂, order "vec"."""
        return self.factored(structure).inverse(self.gamma**2, kind="factored").to_dense(order="vec")

    def sizes(self) -> list[int]:
        """Numbers of parameters of the shown layers."""
        sizes = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in self.model]
        return [size for size in sizes if size]

    def means(self, matrix: Float[Tensor, "size size"]) -> list[list[float]]:
        """The mean absolute value of each block."""
        return block_means(matrix, self.sizes()).tolist()

    def cumulants(self) -> CumulantReport:
        """The error of F̃ in the shown layers, and its bound from higher cumulants [KFAC, eq. 4]."""
        shown = [
            name for name, layer in self.model.named_children() if any(p.requires_grad for p in layer.parameters())
        ]
        return cumulant_report(self.model, ng.Categorical(), self.x, layers=tuple(shown))


def network(run: Run) -> Network:
    """The network of this run, trained with all cases in every batch; its errors become the part "training"."""
    c = run.configuration
    data = labelled.load(c["data"], run.data).take(c["cases"]).resized(c["side"])
    data = data.to(dtype=torch.float64, device=run.device)
    x, y = data.x_train, data.y_train
    model = make_model([c["side"] ** 2, *c["hidden"], CLASSES], run.seed).to(x)
    if run.load("network") is None:
        run.results.pop("training", None)
    run.part("training", lambda: _train(run, model, x, y))
    saved = run.load("network")
    assert saved is not None  # _train wrote it
    gamma = saved.pop("gamma").item()
    model.load_state_dict(saved)
    return Network(model, x, y, gamma).showing(c["shown"])


def make_model(sizes: list[int], seed: int) -> nn.Sequential:
    """Tanh units between linear layers; sparse initialisation, the one of the paper's experiments [KFAC, sec. 13]."""
    layers: list[nn.Module] = []
    for i in range(1, len(sizes)):
        layers += [nn.utils.skip_init(nn.Linear, sizes[i - 1], sizes[i]), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    ng.training.sparse_init_(model, k=15, std=0.25, generator=torch.Generator().manual_seed(seed))
    return model


def _train(run: Run, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """K-FAC with the published rules, every expectation over all cases; the error after each iteration in percent."""
    c = run.configuration
    published = ng.Damping(c["lambda"], ng.FactoredTikhonov(), ng.LevenbergMarquardt(), ng.GreedyGamma())
    optimizer = ng.KFAC.paper(
        model,
        ng.Categorical(),
        l2=c["l2"],
        seed=run.seed,
        damping=published,
        subsets=ng.Subsets(1.0, 1.0),
        periods=ng.Periods(inverses=c["inverses"]),
    )
    errors, gammas = [], []
    with run.bar("training", c["watched"]) as advance:
        for iteration in range(1, c["watched"] + 1):
            optimizer.step(x, y)
            errors.append(_error(model, x, y))
            gammas.append(float(optimizer.stats["gamma"]))
            if iteration == c["iterations"]:
                run.save("network", {**model.state_dict(), "gamma": torch.tensor(gammas[-1], dtype=torch.float64)})
            advance()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "error": errors,
        "gamma": gammas[c["iterations"] - 1],
        "error at the iteration shown": errors[c["iterations"] - 1],
        "iterations to error 0": next((i for i, e in enumerate(errors, 1) if e == 0), None),
    }


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100.0 * (model(x).argmax(-1) != y).double().mean().item()
