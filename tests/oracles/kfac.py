"""Small problems for K-FAC, and the dense twin of its update."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import Factors
from natgrad.damping import ExactTikhonov
from natgrad.optim.settings import Periods, Rescaling, StepGuard, Subsets
from oracles.preconditioning import mlp

__all__ = [
    "EVERY_ROW",
    "FIXED",
    "NO_UPDATE",
    "WHOLE",
    "data",
    "dense_factors",
    "dense_proposal",
    "dense_update",
    "gradient_of",
    "mlp",
    "moved",
    "objective",
    "vector",
]

EVERY_ROW = Subsets(1.0, 1.0)
WHOLE = Rescaling(layers=False)
# Nothing is estimated from a part of the batch, nothing is rejected, no inverse is old and no layer has its own scale.
FIXED = {"subsets": EVERY_ROW, "guard": None, "periods": Periods(inverses=1), "rescaling": WHOLE}
# Every update is rejected: the parameters stay while the factors are averaged.
NO_UPDATE = StepGuard(threshold=math.inf, raise_damping=1.0)


def data(likelihood: Any, d_in: int, d_out: int, n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A batch of inputs and possible targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, ng.Categorical):
        return x, torch.randint(d_out, (n,), generator=generator)
    return x, torch.rand(n, d_out, generator=generator, dtype=torch.float64)


def vector(model: nn.Module) -> Tensor:
    """The trainable parameters, as they are now."""
    return nn.utils.parameters_to_vector([p for p in model.parameters() if p.requires_grad]).detach().clone()


def gradient_of(model: nn.Module, likelihood: Any, x: Any, y: Any, l2: float = 0.0) -> Tensor:
    """∇h by automatic differentiation, with the l2 term."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(likelihood.nll(model(x), y), parameters)
    return nn.utils.parameters_to_vector(found) + l2 * vector(model)


def objective(model: nn.Module, likelihood: Any, x: Any, y: Any, l2: float = 0.0) -> float:
    """h: the loss with the l2 term."""
    return likelihood.nll(model(x), y).item() + 0.5 * l2 * vector(model).square().sum().item()


def moved(model: nn.Module, parameters: Tensor) -> nn.Module:
    """A copy of the model with other parameters."""
    twin = copy.deepcopy(model)
    nn.utils.vector_to_parameters(parameters, twin.parameters())
    return twin


def dense_factors(opt: ng.KFAC) -> dict[str, Factors]:
    """The averaged factors as they are now, written out: later updates do not change them."""
    return {
        name: Factors(block.A.to_dense().clone(), block.G.to_dense().clone())
        for name, block in opt._running.factors.items()
    }


def dense_proposal(
    opt: ng.KFAC,
    model: nn.Module,
    gradient: Tensor,
    damping: float,
    *,
    factors: Mapping[str, Factors] | None = None,
    diagonal: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """−(F̆ + damping I)^{-1} ∇h by layers, with dense Kronecker products of the optimiser's averaged factors.

    Parameters outside of linear layers have a block of their own: ``diagonal[name]``, or the identity.
    """
    factors = factors or dense_factors(opt)
    parts, offset = {}, 0
    for name, p in model.named_parameters():
        parts[name] = gradient[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    solved: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            V = torch.cat([parts[f"{name}.weight"], parts[f"{name}.bias"][:, None]], 1)
            U = _solve(factors[name], V, damping, exact=isinstance(opt.damping.form, ExactTikhonov))
            solved |= {f"{name}.weight": U[:, :-1], f"{name}.bias": U[:, -1]}
    for name in parts.keys() - solved.keys():
        solved[name] = parts[name] / ((diagonal or {}).get(name, 1.0) + damping)
    return -torch.cat([solved[name].reshape(-1) for name in parts])


def dense_update(F: Tensor, damping: float, gradient: Tensor, *directions: Tensor) -> Tensor:
    """The δ in the span of the directions that minimises ``∇h·δ + ½ δᵀ (F + damping I) δ``."""
    H = F + damping * torch.eye(len(F), dtype=F.dtype)
    D = torch.stack([d for d in directions if d.any()], 1)
    return D @ torch.linalg.solve(D.T @ H @ D, -D.T @ gradient)


def _solve(factors: Factors, V: Tensor, damping: float, exact: bool) -> Tensor:
    A, G = factors.A, factors.G
    o, i = V.shape
    eye_a, eye_g = torch.eye(i, dtype=V.dtype), torch.eye(o, dtype=V.dtype)
    if exact:
        block = torch.kron(A, G) + damping * torch.kron(eye_a, eye_g)
    else:
        pi = math.sqrt((A.trace() / i) / (G.trace() / o))
        root = math.sqrt(damping)
        block = torch.kron(A + pi * root * eye_a, G + root / pi * eye_g)
    return torch.linalg.solve(block, V.T.reshape(-1)).view(i, o).T
