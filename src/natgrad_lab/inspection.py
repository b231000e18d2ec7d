"""What the curvature of a network looks like: factors layer by layer, and how much of the Fisher matrix they hold.

Small networks are compared as dense matrices. Larger ones are compared by products with random vectors: with v from
N(0, I), ``E‖M v‖² = ‖M‖²`` (Frobenius), and the exact Fisher matrix needs no memory for ``F v``. F̆ is diagonal in the
same basis as EKFAC, which is the nearest such matrix to F: ``‖F − F̆‖² = ‖F − EKFAC‖² + ‖EKFAC − F̆‖²``, where the last
term needs no random vectors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import to_dense
from natgrad.curvature.ekfac import EigenBlock, eigenvalues
from natgrad.curvature.operator import KroneckerCurvature
from natgrad.curvature.running import mean_eigenvalue
from natgrad.damping import pi
from natgrad.diagnostics import block_means
from natgrad.linalg import safe_eigh

STRUCTURES = {"F̆": "block_diagonal", "F̂": "block_tridiagonal", "EKFAC": "ekfac"}
PER_LAYER = ("F̆", "EKFAC")
# How an inverse is damped, and which structures have that form.
KINDS = {"factored inverse": ("F̆", "F̂"), "exact inverse": ("F̆", "EKFAC")}
CG_ITERATIONS, CG_TOLERANCE, CG_VECTORS = 100, 1e-2, 4  # of systems that are too large to be solved densely


@dataclass(frozen=True)
class Layer:
    """One layer's factors.

    Attributes:
        name: Of the module.
        inputs, outputs: Sizes of A and of G, the bias counted among the inputs.
        eigenvalues_a, eigenvalues_g: In descending order.
        pi: How the damping is split between A and G.
        errors: By structure, ‖F_ii − approximation‖ / ‖F_ii‖ (Frobenius).
    """

    name: str
    inputs: int
    outputs: int
    eigenvalues_a: list[float] = field(repr=False)
    eigenvalues_g: list[float] = field(repr=False)
    pi: float
    errors: dict[str, float]


@dataclass
class Inspection:
    """Everything that was found.

    Attributes:
        about: What was looked at, and how.
        layers: In the order of the modules.
        errors: By structure, the relative Frobenius errors of the "matrix" and, compared with (F + damping I)^{-1}, of
            the "factored inverse" and the "exact inverse", where there is such.
        window: The largest run of neighbouring layers whose Fisher matrix is small enough to be drawn: "layers",
            "sizes", and the means of the blocks of the inverse; empty where there is none.
        matrices: F, F̃ and the damped inverse of F̃ of the window.
    """

    about: dict[str, Any]
    layers: list[Layer]
    errors: dict[str, dict[str, float]]
    window: dict[str, Any]
    matrices: dict[str, Tensor] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """All but the matrices, as plain values."""
        plain = {"layers": [asdict(layer) for layer in self.layers], "errors": self.errors, "window": self.window}
        return {"about": self.about, **plain}


def inspect(
    model: nn.Module,
    likelihood: Any,
    x: Tensor,
    *,
    damping: float | None = None,
    probes: int = 8,
    dense: int = 600,
    solves: int = CG_VECTORS,
    iterations: int = CG_ITERATIONS,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,
) -> Inspection:
    """Inspect a network on a batch; expectations over the targets are exact.

    Args:
        model: A chain of layers; its parameters come back as they were.
        likelihood: p(y | z).
        x: Inputs.
        damping: The coefficient of the identity in the inverses. None: K-FAC's first λ, 0.03 times the mean eigenvalue.
        probes: Random vectors.
        dense: Networks, and windows of layers, of at most so many parameters are compared as dense matrices.
        solves: With so many of the random vectors, at most, the exact inverse is multiplied.
        iterations: Of conjugate gradients for each such product, at most.
        seed: Of the random vectors.
        advance: Told what is being done.
    """
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)  # of the host: the same vectors on every device
    try:
        curvatures = {}
        for name, structure in STRUCTURES.items():
            advance(f"factors of {name}")
            curvatures[name] = ng.kronecker_fisher(model, likelihood, x, structure=structure)
        size = curvatures["F̆"].shape[0]
        used = float(damping if damping is not None else 0.03 * mean_eigenvalue(curvatures["F̆"].factors))
        advance("errors of the whole network")
        V = torch.eye(size).to(x) if size <= dense else torch.randn(size, probes, generator=generator).to(x)
        errors, change = _errors(ng.Fisher(model, likelihood, x), curvatures, V, used, solves, iterations)
        layers = []
        for name in curvatures["F̆"].factors:
            advance(f"layer {name}")
            layers.append(_layer(model, likelihood, x, name, curvatures, probes, dense, generator))
        advance("dense matrices")
        window, matrices = _window(model, likelihood, x, {n.name: n.inputs * n.outputs for n in layers}, dense, used)
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(required[name])
    method = "dense matrices" if size <= dense else f"{probes} random vectors, the inverse from {min(solves, probes)}"
    about = {
        "parameters": size,
        "rows": len(x),
        "damping": used,
        "errors from": method,
        "change of the exact inverse": change,
    }
    return Inspection(about, layers, errors, window, matrices)


def _errors(
    F: Any, curvatures: dict[str, KroneckerCurvature], V: Tensor, damping: float, solves: int, limit: int
) -> tuple[dict[str, dict[str, float]], float]:
    """The errors, and by how much conjugate gradients that ran out of iterations changed late."""
    exact = F @ V
    inverses = {
        (name, kind): curvatures[name].inverse(damping, kind=kind.partition(" ")[0])
        for kind, names in KINDS.items()
        for name in names
    }
    change = 0.0
    if V.shape[0] == V.shape[1]:
        solved, W = torch.linalg.inv(exact + damping * torch.eye(len(V)).to(V)), V
    else:
        W = V[:, :solves]
        solutions = [
            ng.linalg.cg(
                lambda v: F @ v + damping * v,
                v,
                CG_TOLERANCE,
                limit,
                preconditioner=inverses["EKFAC", "exact inverse"],
                store=[limit // 2],
            )
            for v in W.unbind(1)
        ]
        solved = torch.stack([solution.x for solution in solutions], dim=1)
        halves = [s.iterates[limit // 2] if s.iterations == limit else s.x for s in solutions]
        change = _relative(solved, torch.stack(halves, dim=1))
    errors = {name: {"matrix": _relative(exact, k @ V)} for name, k in curvatures.items()}
    for (name, kind), inverse in inverses.items():
        errors[name][kind] = _relative(solved, inverse @ W)
    if V.shape[0] != V.shape[1]:
        blocks = [block for _, block in curvatures["EKFAC"].blocks]
        errors["F̆"]["matrix"] = _of_kronecker(errors["EKFAC"]["matrix"], blocks, exact)
    return errors, change


def _layer(
    model: nn.Module,
    likelihood: Any,
    x: Tensor,
    name: str,
    curvatures: dict[str, KroneckerCurvature],
    probes: int,
    dense: int,
    generator: torch.Generator,
) -> Layer:
    A, G = (to_dense(factor) for factor in (curvatures["F̆"].factors[name].A, curvatures["F̆"].factors[name].G))
    where = list(curvatures["F̆"].factors).index(name)
    index = curvatures["F̆"].blocks[where][0]
    place = index - index.min()  # a layer's parameters are neighbours
    n = len(index)
    V = torch.eye(n).to(x) if n <= dense else torch.randn(n, probes, generator=generator).to(x)
    _show(model, [name])
    exact = ng.Fisher(model, likelihood, x) @ V
    errors = {}
    for key in PER_LAYER:
        approximation = torch.empty_like(V)
        approximation[place] = curvatures[key].blocks[where][1] @ V[place]
        errors[key] = _relative(exact, approximation)
    if n > dense:
        errors["F̆"] = _of_kronecker(errors["EKFAC"], [curvatures["EKFAC"].blocks[where][1]], exact)
    _show(model, None)
    a, g = (safe_eigh(M).values.flip(0).tolist() for M in (A, G))
    return Layer(name, len(A), len(G), a, g, float(pi(A, G)), errors)


def _window(
    model: nn.Module, likelihood: Any, x: Tensor, sizes: dict[str, int], dense: int, damping: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = list(sizes)
    runs = [names[i:j] for i in range(len(names)) for j in range(i + 1, len(names) + 1)]
    fitting = [run for run in runs if sum(sizes[name] for name in run) <= dense]
    if not fitting:
        return {}, {}
    chosen = max(fitting, key=lambda run: (len(run), sum(sizes[name] for name in run)))
    _show(model, chosen)
    exact = ng.Fisher(model, likelihood, x).to_dense(order="vec")
    k = ng.kronecker_fisher(model, likelihood, x, structure="full")
    factored, inverse = k.to_dense(order="vec"), k.inverse(damping).to_dense(order="vec")
    _show(model, None)
    shown = [sizes[name] for name in chosen]
    means = block_means(inverse, shown).tolist()
    window = {"layers": chosen, "sizes": shown, "inverse means": means, "error of F̃": _relative(exact, factored)}
    return window, {"F": exact.cpu(), "F̃": factored.cpu(), "inverse": inverse.cpu()}


def _show(model: nn.Module, layers: list[str] | None) -> None:
    """Only these layers (None: all) have gradients."""
    for name, p in model.named_parameters():
        p.requires_grad_(layers is None or name.rpartition(".")[0] in layers)


def _of_kronecker(ekfac: float, blocks: Sequence[Any], exact: Tensor) -> float:
    """The relative error of F̆ from that of EKFAC.

    Args:
        ekfac: Its relative error.
        blocks: Those of EKFAC.
        exact: F times random vectors, as columns.
    """
    apart = sum(
        (block.scaling - eigenvalues(block.basis)).square().sum().item()
        for block in blocks
        if isinstance(block, EigenBlock)
    )
    return math.sqrt(ekfac**2 + apart * exact.shape[1] / exact.square().sum().item())


def _relative(exact: Tensor, approximation: Tensor) -> float:
    return ((exact - approximation).norm() / exact.norm()).item()
