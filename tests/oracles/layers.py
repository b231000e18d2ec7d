"""The factors of a layer from its definition, by differentiating: no patch is unfolded, no index is computed.

A layer that is linear in its weight has ``∂s[o] / ∂W[o, :] = a`` for the output s at one position, and no other output
there depends on these weights: one derivative per position gives the rows a, for any padding, stride or group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions_last(layer: nn.Module, s: Tensor) -> Tensor:
    """[out, positions] from one example's output."""
    return s.flatten(1) if isinstance(layer, nn.modules.conv._ConvNd) else s.reshape(-1, s.shape[-1]).T


def group_rows(layer: Any, x: Tensor, group: int, groups: int) -> Tensor:
    """[positions, columns] of one example x (without a batch dimension): derivatives of a group's first output."""
    with torch.enable_grad():
        s = positions_last(layer, layer(x[None])[0])
        out = s.shape[0] // groups
        rows = []
        for value in s[group * out]:
            (weight,) = torch.autograd.grad(value, layer.weight, retain_graph=True)
            if isinstance(layer, nn.modules.conv._ConvTransposeNd):
                per_group = weight.shape[0] // groups
                weight = weight[group * per_group : (group + 1) * per_group, 0]
            else:
                weight = weight[group * out]
            rows.append(weight.flatten())
    a = torch.stack(rows)
    return a if layer.bias is None else torch.cat([a, a.new_ones(len(a), 1)], dim=1)


def kronecker(
    model: nn.Module, layer: Any, x: Tensor, curvature: Callable[[Tensor], Tensor], sharing: str = "expand"
) -> tuple[Tensor, Tensor]:
    """A and G of a layer that the model calls once, with the mean over examples; stacks where it has groups.

    Args:
        curvature: F_R of one example's flattened output.
    """
    groups = getattr(layer, "groups", 1)
    A, G, N = [0.0] * groups, [0.0] * groups, len(x)
    for n in range(N):
        seen: list[tuple[Tensor, Tensor]] = []
        handle = layer.register_forward_hook(lambda module, args, out, seen=seen: seen.append((args[0], out)))
        z = model(x[n : n + 1])[0].flatten()
        handle.remove()
        (a, s), F = seen[0], curvature(z.detach())
        J = torch.stack([torch.autograd.grad(scalar, s, retain_graph=True)[0][0] for scalar in z])
        g = torch.stack([positions_last(layer, j) for j in J])  # [D, out, positions]
        out = g.shape[1] // groups
        for i in range(groups):
            rows = group_rows(layer, a[0].detach(), i, groups)
            own = g[:, i * out : (i + 1) * out]
            if sharing == "reduce":
                rows, own = rows.mean(0, keepdim=True), own.sum(2, keepdim=True)
            A[i] = A[i] + rows.T @ rows / N
            G[i] = G[i] + torch.einsum("dop,de,eqp->oq", own, F, own) / own.shape[2] / N
    return (A[0], G[0]) if groups == 1 else (torch.stack(A), torch.stack(G))


def softmax_fisher(z: Tensor) -> Tensor:
    p = z.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def diagonal(model: nn.Module, parameters: list[Tensor], x: Tensor, curvature: Callable[[Tensor], Tensor]) -> Tensor:
    """The diagonal of the Fisher matrix of some parameters: per-example Jacobians, mean over examples."""
    total = 0.0
    for n in range(len(x)):
        z = model(x[n : n + 1])[0].flatten()
        J = torch.stack(
            [torch.cat([d.flatten() for d in torch.autograd.grad(s, parameters, retain_graph=True)]) for s in z]
        )
        total = total + (J.T @ curvature(z.detach()) @ J).diagonal() / len(x)
    return total
