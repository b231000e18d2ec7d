"""Dense curvature by loops over examples and outputs, targets enumerated; only `torch.autograd` and formulas on paper.

`call(model, x) → z` evaluates the model; parameters are ordered as `model.parameters()` with requires_grad, row-major.
`nll` is a function of (z, y) → summed negative log-likelihood, so that scales are visible where they are applied.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[nn.Module, Any], Tensor]
Nll = Callable[[Tensor, Tensor], Tensor]


def default_call(model: nn.Module, x: Any) -> Tensor:
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, dict) else model(x)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat_gradient(scalar: Tensor, model: nn.Module, **options: Any) -> Tensor:
    grads = torch.autograd.grad(scalar, parameters(model), allow_unused=True, retain_graph=True, **options)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, parameters(model), strict=True)]
    )


def rows(x: Any, n: int) -> Any:
    """Example n alone, as a batch of one."""
    if isinstance(x, tuple):
        return tuple(part[n : n + 1] for part in x)
    return {k: part[n : n + 1] for k, part in x.items()} if isinstance(x, dict) else x[n : n + 1]


def jacobian(
    model: nn.Module, x: Any, call: Call = default_call, of: Callable[[Tensor], Tensor] = lambda z: z
) -> Tensor:
    """d of(z) / dθ, one row per element."""
    return torch.stack([flat_gradient(element, model) for element in of(call(model, x)).reshape(-1)]).detach()


def hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """∂² loss / ∂θ², one row per parameter element."""
    gradient = flat_gradient(loss(), model, create_graph=True)
    return torch.stack(
        [flat_gradient(g, model) if g.requires_grad else torch.zeros_like(gradient) for g in gradient]
    ).detach()


def gauss_newton(model: nn.Module, x: Any, loss_of_z: Callable[[Tensor], Tensor], call: Call = default_call) -> Tensor:
    """Jᵀ H J with H the dense Hessian of the whole batch's loss in all of z."""
    z = call(model, x).detach()
    flat = z.reshape(-1)
    h = torch.autograd.functional.hessian(lambda u: loss_of_z(u.reshape(z.shape)), flat)
    j = jacobian(model, x, call)
    return j.T @ h @ j


def fisher_by_enumeration(
    model: nn.Module, x: Any, family: str, *, variance: float = 1.0, call: Call = default_call
) -> Tensor:
    """Σ_n Σ_y p(y|z_n) ∇ nll(z_n, y) ∇ᵀ: every y that can occur, for each example alone; divided by nothing.

    Gaussian targets cannot be enumerated; z ± σ in every element, each sign pattern with equal weight, has the same
    first two moments, and the gradient is linear in y.
    """
    n = rows_of(x)
    total = torch.zeros(())
    for i in range(n):
        one = rows(x, i)
        z = call(model, one)
        for probability, y in targets(z.detach(), family, variance):
            g = flat_gradient(nll(family, variance)(z, y), model)
            total = total + probability * torch.outer(g, g)
    return total


def targets(z: Tensor, family: str, variance: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Every (probability, y) for one z; several positions are independent given z."""
    if family == "categorical":
        p = torch.softmax(z, -1).reshape(-1, z.shape[-1])
        for choice in itertools.product(range(z.shape[-1]), repeat=p.shape[0]):
            probability = torch.stack([p[i, c] for i, c in enumerate(choice)]).prod()
            yield probability, torch.tensor(choice).reshape(z.shape[:-1])
        return
    for signs in itertools.product((0.0, 1.0), repeat=z.numel()):
        s = torch.tensor(signs, dtype=z.dtype).reshape(z.shape)
        if family == "bernoulli":
            p = torch.sigmoid(z)
            yield torch.where(s == 1, p, 1 - p).prod(), s
        else:
            yield torch.tensor(0.5 ** z.numel(), dtype=z.dtype), z + (2 * s - 1) * variance**0.5


def nll(family: str, variance: float = 1.0, weight: Tensor | None = None) -> Nll:
    """The summed negative log-likelihood on paper."""

    def summed(z: Tensor, y: Tensor) -> Tensor:
        w = 1.0 if weight is None else weight
        if family == "gaussian":
            return (w * (z - y) ** 2).sum() / (2 * variance)
        if family == "bernoulli":
            return -(w * (y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))).sum()
        return -(w * torch.log_softmax(z, -1).gather(-1, y[..., None])[..., 0]).sum()

    return summed


def count(family: str, normalizer: str, z: Tensor) -> int:
    """The divisor on paper: examples, scalar targets, or 1."""
    elements = z.shape[:-1].numel() if family == "categorical" else z.numel()
    return {"example": z.shape[0], "element": elements, "none": 1}[normalizer]


def gauss_newton_in_probabilities(
    model: nn.Module, x: Any, y: Tensor, family: str, *, variance: float = 1.0, call: Call = default_call
) -> Tensor:
    """J_fᵀ D(f, y) J_f with D of [THESIS, table 3.I] (I / variance for Gaussian outputs); divided by nothing."""
    to_mean = {"gaussian": lambda z: z, "bernoulli": torch.sigmoid, "categorical": lambda z: torch.softmax(z, -1)}[
        family
    ]
    f = to_mean(call(model, x)).detach()
    if family == "gaussian":
        d = torch.full_like(f, 1 / variance)
    elif family == "bernoulli":
        d = y / f**2 + (1 - y) / (1 - f) ** 2
    else:
        d = F.one_hot(y, f.shape[-1]) / f**2
    j = jacobian(model, x, call, to_mean)
    return j.T @ (d.reshape(-1, 1) * j)


def per_example_gradients(model: nn.Module, x: Any, y: Tensor, summed: Nll, call: Call = default_call) -> Tensor:
    """``[N, P]``: the gradient of each example's own summed nll, the model run on that example alone."""
    n = rows_of(x)
    return torch.stack([flat_gradient(summed(call(model, rows(x, i)), y[i : i + 1]), model) for i in range(n)]).detach()


def rows_of(x: Any) -> int:
    if isinstance(x, tuple):
        return x[0].shape[0]
    return next(iter(x.values())).shape[0] if isinstance(x, dict) else x.shape[0]


def vec_order(model: nn.Module) -> list[int]:
    """For Linear-only models: where each entry of the stacked columns of [W b] stands in the parameter order."""
    start, order = 0, []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows_, columns = module.weight.shape
            for c in range(columns):
                order += [start + r * columns + c for r in range(rows_)]
            start += rows_ * columns
            if module.bias is not None:
                order += [start + r for r in range(rows_)]
                start += rows_
    return order
