"""Inverses and roots of a damped covariance, dense and of low rank, against torch.linalg."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from natgrad.linalg.covariance import covariance, covariance_inverse, covariance_inverse_root, low_rank


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    ) + torch.linspace(-1, 2, d, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(n=st.integers(2, 6), d=st.integers(1, 9), rank=st.sampled_from([None, 6, 7]), centre=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_inverse_and_root_equal_dense_ones(n: int, d: int, rank: int | None, centre: bool) -> None:
    h = rows(n, d)
    C = torch.cov(h.T, correction=0).reshape(d, d) if centre else h.T @ h / n
    damped = C + 0.3 * torch.eye(d, dtype=h.dtype)
    found = covariance_inverse(h, 0.3, rank=rank, centre=centre)
    assert found.ok and (found.dense is None) == (rank is not None)
    close(found.to_dense(), torch.linalg.inv(damped))
    U = covariance_inverse_root(h, 0.3, rank=rank, centre=centre)
    assert U.root.ok and U.inverse.ok
    close(U.root.to_dense() @ U.root.to_dense() @ damped, torch.eye(d, dtype=h.dtype))
    close(U.inverse.to_dense() @ U.root.to_dense(), torch.eye(d, dtype=h.dtype))
    close(U.root.to_dense(), U.root.to_dense().T)


@pytest.mark.parametrize("rank", [None, 5])
def test_products(rank: int | None) -> None:
    h, X = rows(5, 12), rows(3, 12, seed=1)
    for M in (covariance_inverse(h, 0.1, rank=rank), *covariance_inverse_root(h, 0.1, rank=rank)):
        close(M.right_product(X), X @ M.to_dense())
        close(M.vector_product(X[0]), M.to_dense() @ X[0])
        into = X.clone()
        M.add_product(into, 2 * X, beta=0.5, alpha=-0.7)
        close(into, 0.5 * X - 1.4 * X @ M.to_dense())


def test_covariance_divides_by_n() -> None:
    h = rows(7, 3)
    close(covariance(h), torch.cov(h.T, correction=0))
    close(covariance(h, h.mean(0)), torch.cov(h.T, correction=0))


def test_what_has_no_inverse_says_so() -> None:
    h = rows(9, 4)
    h[:, 2] = 1.0  # constant
    assert not covariance_inverse(h, 0.0).ok
    assert not covariance_inverse_root(h, 0.0).root.ok
    assert not covariance_inverse_root(h[:2], 0.0, rank=2).root.ok
    spoilt = torch.where(torch.eye(9, 4) == 1, torch.nan, h)
    for rank in (None, 9):
        assert not covariance_inverse(spoilt, 0.1, rank=rank).ok
        assert not covariance_inverse_root(spoilt, 0.1, rank=rank).root.ok


def test_low_rank_pays_below_half_of_the_width_and_with_damping() -> None:
    assert low_rank(4, 9) and not low_rank(5, 10) and not low_rank(None, 10) and not low_rank(1, 10, 0.0)
