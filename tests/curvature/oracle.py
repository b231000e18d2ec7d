"""Kronecker-factored curvature by loops over examples, positions, outputs and layers: slow, dense and obvious.

Everything is in the "vec" order: per layer the columns of [W b] stacked, layers in order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.likelihoods import Bernoulli, Categorical, Gaussian


class Net(nn.Module):
    """Linear layers with tanh between them; sequences [N, T, d] go position by position, or mix."""

    def __init__(self, widths: list[int], bias: bool = True, mix: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.mix = mix
        generator = torch.Generator().manual_seed(seed)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias, dtype=torch.float64) for i, o in pairs)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i:
                x = torch.tanh(x)
                if self.mix:
                    x = x + 0.3 * x.flip(1).cumsum(1)
            x = layer(x)
        return x


def output_fisher(likelihood, z: Tensor) -> Tensor:
    """F_R of one example, [D, D] with D = z.numel(), from the definition of each distribution."""
    flat = z.reshape(-1)
    if isinstance(likelihood, Gaussian):
        return torch.eye(len(flat), dtype=z.dtype) / likelihood.variance
    if isinstance(likelihood, Bernoulli):
        p = torch.sigmoid(flat)
        return torch.diag(p * (1 - p))
    assert isinstance(likelihood, Categorical)
    blocks = []
    for logits in z.reshape(-1, z.shape[-1]):
        p = logits.softmax(0)
        blocks.append(torch.diag(p) - torch.outer(p, p))
    return torch.block_diag(*blocks)


def empirical_fisher(likelihood, z: Tensor, y: Tensor) -> Tensor:
    """u uᵀ, u the derivative of one example's own summed nll with respect to z."""
    leaf = z.detach().clone().requires_grad_()
    if isinstance(likelihood, Gaussian):
        loss = 0.5 * (leaf - y).square().sum() / likelihood.variance
    elif isinstance(likelihood, Bernoulli):
        loss = F.binary_cross_entropy_with_logits(leaf, y, reduction="sum")
    else:
        loss = F.cross_entropy(leaf.reshape(-1, leaf.shape[-1]), y.reshape(-1), reduction="sum")
    (u,) = torch.autograd.grad(loss, leaf)
    return torch.outer(u.reshape(-1), u.reshape(-1))


def count_of(likelihood, z: Tensor) -> float:
    elements = z[..., 0].numel() if isinstance(likelihood, Categorical) else z.numel()
    return {"example": z.shape[0], "element": elements, "none": 1}[likelihood.normalizer]


@dataclass
class Example:
    """One example's ā [R, columns] and derivatives J = dz/ds [D, R, out] per layer, and its curvature at the output."""

    a: list[Tensor]
    J: list[Tensor]
    F: Tensor


def examples(net: Net, likelihood, x: Tensor, y: Tensor | None = None) -> list[Example]:
    """y given: empirical."""
    found = []
    for n in range(len(x)):
        calls: list[tuple[Tensor, Tensor]] = []
        handles = [
            layer.register_forward_hook(lambda m, i, o, calls=calls: calls.append((i[0], o))) for layer in net.layers
        ]
        z = net(x[n : n + 1])[0]
        for handle in handles:
            handle.remove()
        a, J = [], []
        for layer, (inputs, outputs) in zip(net.layers, calls, strict=True):
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            if layer.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
            a.append(rows)
            derivative = [torch.autograd.grad(scalar, outputs, retain_graph=True)[0] for scalar in z.reshape(-1)]
            J.append(torch.stack(derivative).reshape(z.numel(), len(rows), -1))
        curvature = output_fisher(likelihood, z) if y is None else empirical_fisher(likelihood, z, y[n])
        found.append(Example(a, J, curvature.detach()))
    return found


def factor(net: Net, likelihood, x: Tensor, i: int, j: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(A_ij, G_ij): A = Σ a aᵀ / N; G = Σ g gᵀ / rows · N / count, expectations over targets written out."""
    A, G, rows, N = 0.0, 0.0, 0, len(x)
    for example in examples(net, likelihood, x, y):
        for r in range(len(example.a[i])):
            A = A + torch.outer(example.a[i][r], example.a[j][r])
            G = G + example.J[i][:, r].T @ example.F @ example.J[j][:, r]
            rows += 1
    count = N if y is not None else count_of(likelihood, net(x))
    return A / N, G / rows * (N / count)


def block_diagonal(net: Net, likelihood, x: Tensor, y: Tensor | None = None) -> Tensor:
    return torch.block_diag(*(torch.kron(*factor(net, likelihood, x, i, i, y)) for i in range(len(net.layers))))


def full(net: Net, likelihood, x: Tensor, y: Tensor | None = None) -> Tensor:
    n = range(len(net.layers))
    return torch.cat([torch.cat([torch.kron(*factor(net, likelihood, x, i, j, y)) for j in n], dim=1) for i in n])


def exact_block(net: Net, likelihood, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Per layer the sum over examples of Jᵀ F J, J = dz / dvec([W b])."""
    blocks = [0.0] * len(net.layers)
    for example in examples(net, likelihood, x, y):
        for i, (a, J) in enumerate(zip(example.a, example.J, strict=True)):
            jacobian = sum(torch.stack([torch.kron(a[r], J[d, r]) for d in range(len(J))]) for r in range(len(a)))
            blocks[i] = blocks[i] + jacobian.T @ example.F @ jacobian
    count = len(x) if y is not None else count_of(likelihood, net(x))
    return torch.block_diag(*blocks) / count


def input_covariance(net: Net, likelihood, x: Tensor, alpha: float) -> Tensor:
    factors = [factor(net, likelihood, x, i, i) for i in range(len(net.layers))]
    return torch.block_diag(*(torch.kron(A, alpha * torch.eye(len(G), dtype=G.dtype)) for A, G in factors))
