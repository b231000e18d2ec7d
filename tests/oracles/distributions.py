"""Distributions p(y | z) on paper: the negative log-likelihood written out, and every target with its probability."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# From the z of one example, a batch of one: probabilities [K], and the K possible targets as a batch.
Outcomes = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Twin:
    """`nll(z, y)` is summed over all targets; `outcomes(z)` lists one example's targets; `mean(z)` is E[y] or p."""

    nll: Callable[[Tensor, Tensor], Tensor]
    outcomes: Outcomes
    mean: Callable[[Tensor], Tensor]


def _products(
    choices: list[list[tuple[Tensor, float]]], shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Independent elements: every combination of (probability, value), one list of them per element."""
    probabilities, values = [], []
    for combination in itertools.product(*choices):
        probabilities.append(torch.stack([p for p, _ in combination]).prod())
        values.append([v for _, v in combination])
    return torch.stack(probabilities), torch.tensor(values, dtype=dtype).reshape(-1, *shape)


def gaussian(variance: float = 1.0) -> Twin:
    """Targets z ± σ: the first two moments of the normal distribution, which is all that a linear score needs."""

    def outcomes(z: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.tensor(0.5, dtype=z.dtype)
        choices = [[(half, e - variance**0.5), (half, e + variance**0.5)] for e in z.flatten().tolist()]
        return _products(choices, z.shape[1:], z.dtype)

    return Twin(lambda z, y: ((y - z) ** 2).sum() / (2 * variance), outcomes, lambda z: z)


def bernoulli() -> Twin:
    def nll(z: Tensor, y: Tensor) -> Tensor:
        p = 1 / (1 + torch.exp(-z))
        return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).sum()

    def outcomes(z: Tensor) -> tuple[Tensor, Tensor]:
        choices = [[(1 / (1 + torch.exp(e)), 0.0), (1 / (1 + torch.exp(-e)), 1.0)] for e in z.flatten()]
        return _products(choices, z.shape[1:], z.dtype)

    return Twin(nll, outcomes, lambda z: 1 / (1 + torch.exp(-z)))


def categorical(class_dim: int = -1) -> Twin:
    def softmax(z: Tensor) -> Tensor:
        e = torch.exp(z)
        return e / e.sum(class_dim, keepdim=True)

    def nll(z: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log(softmax(z))
        return -log_p.gather(class_dim, y.unsqueeze(class_dim)).sum()

    def outcomes(z: Tensor) -> tuple[Tensor, Tensor]:
        p = softmax(z).movedim(class_dim, -1)
        choices = [[(q, c) for c, q in enumerate(row)] for row in p.reshape(-1, p.shape[-1])]
        return _products(choices, p.shape[1:-1], torch.int64)

    return Twin(nll, outcomes, softmax)


def poisson(largest: int = 60) -> Twin:
    """Counts up to `largest`: beyond them nothing is left at rates of a few."""

    def outcomes(z: Tensor) -> tuple[Tensor, Tensor]:
        def pmf(e: Tensor, n: int) -> Tensor:
            return torch.exp(n * e - torch.exp(e) - math.lgamma(n + 1))

        choices = [[(pmf(e, n), n) for n in range(largest)] for e in z.flatten()]
        return _products(choices, z.shape[1:], z.dtype)

    return Twin(lambda z, y: (torch.exp(z) - y * z).sum(), outcomes, torch.exp)


def scores(twin: Twin, z: Tensor) -> tuple[Tensor, Tensor]:
    """For one example z (a batch of one): probabilities [K] and the gradient in z of every outcome, ``[K, D]``."""
    p, y = twin.outcomes(z)
    repeated = z.detach().expand(len(p), *z.shape[1:]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(twin.nll(repeated, y), repeated)
    return p, gradient.reshape(len(p), -1)


def fisher(twin: Twin, z: Tensor) -> Tensor:
    """``Σ_y p(y|z) s sᵀ`` of every example, ``[batch, D, D]``."""
    blocks = []
    for row in z.split(1):
        p, s = scores(twin, row)
        blocks.append(torch.einsum("k,ki,kj->ij", p, s, s))
    return torch.stack(blocks)


def expected_hessian(twin: Twin, z: Tensor) -> Tensor:
    """``Σ_y p(y|z) ∂²nll/∂z²`` of every example, ``[batch, D, D]``."""
    blocks = []
    for row in z.split(1):
        p, y = twin.outcomes(row)

        def expectation(e: Tensor, p: Tensor = p, y: Tensor = y, shape: torch.Size = row.shape) -> Tensor:
            losses = torch.func.vmap(lambda target: twin.nll(e.reshape(shape), target[None]))(y)
            return (p * losses).sum()

        blocks.append(torch.func.hessian(expectation)(row.flatten()))
    return torch.stack(blocks)
