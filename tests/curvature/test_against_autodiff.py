"""Blocks of the matrix-free operators: masks, class weights, class dimensions, likelihoods of one's own."""

import pytest
import torch
from curvature.oracle import Net
from torch import nn

from natgrad.curvature import kronecker_fisher
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from natgrad.operators.autodiff import EmpiricalFisher, Fisher


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class ClassesFirst(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
MASKED = torch.tensor([[0, 1, -1, 2], [2, -1, -1, 1], [1, 0, 0, 2]])
CLASSES = MASKED.clamp(min=0)
SOFT = draw(3, 4, 3, seed=8).sigmoid()
CASES = {
    "class weights": (Categorical("element", class_weight=WEIGHTS), CLASSES),
    "weighted mean": (Categorical("weighted", class_weight=WEIGHTS, ignore_index=-1), MASKED),
    "mask": (Categorical("element", ignore_index=-1), MASKED),
    "mask per example": (Categorical("example", ignore_index=-1), MASKED),
    "label smoothing": (Categorical(label_smoothing=0.2), CLASSES),
    "classes first": (Categorical("element", class_dim=1, ignore_index=-1), MASKED),
    "pos_weight": (Bernoulli(pos_weight=WEIGHTS), SOFT),
    "weight": (Bernoulli("none", weight=WEIGHTS), SOFT),
    "gaussian": (Gaussian(2.0, "element"), SOFT),
    "poisson": (Poisson(), SOFT.round()),
}


def problem(case):
    likelihood, y = CASES[case]
    net = Net([2, 3, 3], mix=True)
    return (ClassesFirst(net) if case == "classes first" else net), likelihood, draw(3, 4, 2), y


def check_blocks(found, full):
    start = 0
    for size in (9, 12):
        block = slice(start, start + size)
        torch.testing.assert_close(found[block, block], full[block, block])
        start += size
    assert found[:9, 9:].abs().max() == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_exact_blocks_are_those_of_the_fisher(case, weighted):
    model, likelihood, x, y = problem(case)
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64) if weighted else None
    k = kronecker_fisher(model, likelihood, x, structure="exact_block", expectation="exact", y=y, weight=weight)
    check_blocks(k.to_dense(), Fisher(model, likelihood, x, y=y, weight=weight).to_dense())
    parts = kronecker_fisher(
        model,
        likelihood,
        [x[:1], x[1:]],
        structure="exact_block",
        expectation="exact",
        y=[y[:1], y[1:]],
        weight=None if weight is None else [weight[:1], weight[1:]],
    )
    torch.testing.assert_close(parts.to_dense(), k.to_dense())


@pytest.mark.parametrize("case", CASES)
def test_empirical_blocks_are_those_of_the_empirical_fisher(case):
    model, likelihood, x, y = problem(case)
    k = kronecker_fisher(model, likelihood, x, structure="exact_block", expectation="empirical", y=y)
    check_blocks(k.to_dense(), EmpiricalFisher(model, likelihood, x, y).to_dense())


@pytest.mark.parametrize("case", CASES)
def test_sampled_estimates_carry_the_weights(case):
    model, likelihood, x, y = problem(case)
    options = {"structure": "exact_block", "y": y}
    exact = kronecker_fisher(model, likelihood, x, expectation="exact", **options).to_dense()
    generator = torch.Generator().manual_seed(0)
    sampled = kronecker_fisher(
        model, likelihood, x, expectation="sampled", samples=2000, generator=generator, **options
    ).to_dense()
    assert (sampled - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("case", CASES)
def test_block_diagonal_of_one_row_is_exact(case):
    """One example with one position: E[aaᵀ ⊗ ggᵀ] = E[aaᵀ] ⊗ E[ggᵀ]."""
    model, likelihood, x, y = problem(case)
    x, y = x[:1, :1], y[:1, :1]
    k = kronecker_fisher(model, likelihood, x, structure="block_diagonal", expectation="exact", y=y)
    check_blocks(k.to_dense(), Fisher(model, likelihood, x, y=y).to_dense())
    full = kronecker_fisher(model, likelihood, x, structure="full", expectation="exact", y=y)
    torch.testing.assert_close(full.to_dense(), Fisher(model, likelihood, x, y=y).to_dense())


@pytest.mark.parametrize("case", ["class weights", "mask", "pos_weight"])
def test_targets_are_asked_for(case):
    model, likelihood, x, y = problem(case)
    for structure in ("block_diagonal", "full", "exact_block"):
        with pytest.raises(ValueError, match="pass y="):
            kronecker_fisher(model, likelihood, x, structure=structure, expectation="sampled")


def test_targets_out_of_range():
    model, _, x, y = problem("mask")
    for structure in ("block_diagonal", "full"):
        with pytest.raises(ValueError, match="class"):
            kronecker_fisher(model, Categorical(), x, structure=structure, expectation="empirical", y=y + 7)


class Laplace:
    """A likelihood of one's own: the five methods of the protocol, nothing optional."""

    def nll(self, z, y, *, weight=None, count=None):
        loss = torch.log(torch.cosh(z - y))
        loss = loss if weight is None else loss * weight.reshape(-1, *[1] * (z.ndim - 1))
        return loss.sum() / (self.count(z, y, weight) if count is None else count)

    def count(self, z, y=None, weight=None):
        return z.new_tensor(float(z.shape[0]))

    def sample(self, z, generator=None):
        u = torch.rand(z.shape, generator=generator, dtype=z.dtype)
        return z + torch.log(torch.tan(u * torch.pi / 2))  # hyperbolic secant: density ∝ 1 / cosh

    def fisher_product(self, z, v):
        return v / 2

    def fisher_factor(self, z):
        n = z[0].numel()
        return (torch.eye(n, dtype=z.dtype) / 2**0.5).reshape(*z.shape[1:], n).expand(*z.shape, n)


def test_likelihood_of_ones_own():
    net, x, likelihood = Net([2, 3, 3]), draw(5, 2), Laplace()
    exact = kronecker_fisher(net, likelihood, x, structure="exact_block", expectation="exact").to_dense()
    check_blocks(exact, Fisher(net, likelihood, x).to_dense())
    generator = torch.Generator().manual_seed(0)
    sampled = kronecker_fisher(
        net, likelihood, x, structure="exact_block", expectation="sampled", samples=2000, generator=generator
    ).to_dense()
    assert (sampled - exact).norm() < 0.1 * exact.norm()
    with pytest.raises(ValueError, match="weight: Laplace has no curvature_weight"):
        kronecker_fisher(net, likelihood, x, weight=torch.ones(5))
