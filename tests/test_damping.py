"""The norms in π by their formulas, and how damping is split between the factors."""

import math

import pytest
import torch
from torch import linalg

from natgrad.damping import ExactTikhonov, FactoredTikhonov, pi


def factor(n: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, n + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T


A, G = factor(5, 0), factor(3, 1)
I_A, I_G = torch.eye(5, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
NORMS = {
    "trace": lambda M: linalg.matrix_norm(M, "nuc"),
    "frobenius": lambda M: linalg.matrix_norm(M, "fro"),
    "spectral": lambda M: linalg.matrix_norm(M, 2),
    "one": lambda M: torch.ones((), dtype=torch.float64),
}


@pytest.mark.parametrize("norm", NORMS)
def test_pi_is_the_root_of_the_ratio_of_norms_of_the_big_products(norm):
    expected = (NORMS[norm](torch.kron(A, I_G)) / NORMS[norm](torch.kron(I_A, G))).sqrt()
    torch.testing.assert_close(pi(A, G, norm), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_pi_of_diagonal_factors(norm):
    a, g = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([3.0, 0.5])
    torch.testing.assert_close(pi(a, g, norm), pi(torch.diag(a), torch.diag(g), norm))


def test_trace_norm_counts_the_homogeneous_coordinate():
    torch.testing.assert_close(pi(A, G), torch.sqrt((A.trace() / 5) / (G.trace() / 3)))


@pytest.mark.parametrize("norm", NORMS)
def test_pi_of_a_zero_factor_is_one(norm):
    assert pi(A, torch.zeros_like(G), norm) == 1
    assert pi(torch.zeros_like(A), G, norm) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_split(norm):
    of_a, of_g = FactoredTikhonov(norm).split(A, G, 0.09)
    torch.testing.assert_close(of_a, 0.3 * pi(A, G, norm))
    torch.testing.assert_close(of_g, 0.3 / pi(A, G, norm))
    torch.testing.assert_close(of_a * of_g, torch.tensor(0.09, dtype=torch.float64))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="pi='max'.*'trace'"):
        FactoredTikhonov(pi="max")
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="damping="):
            FactoredTikhonov().split(A, G, bad)


def test_damping_objects_are_values():
    assert FactoredTikhonov() == FactoredTikhonov("trace") != FactoredTikhonov("one")
    assert ExactTikhonov() == ExactTikhonov() and hash(ExactTikhonov()) == hash(ExactTikhonov())
