"""Orthogonal matrices as products of reflections, against the matrices themselves."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from natgrad.linalg.reflectors import Reflectors


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(r=st.integers(1, 5), more=st.integers(0, 6), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_products_and_columns(r: int, more: int, k: int, seed: int) -> None:
    n = r + more
    U = torch.linalg.qr(draw(n, r, seed=seed)).Q
    reflectors = Reflectors.beginning_with(U)
    Q, V = reflectors.to_dense(), draw(n, k, seed=seed + 1)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=Q.dtype))
    torch.testing.assert_close(Q[:, :r] * (Q[:, :r] * U).sum(0), U)  # up to the signs of columns
    torch.testing.assert_close(reflectors.leading(), Q[:, :r])
    out = torch.full_like(V, torch.nan)
    for found, expected in (
        (reflectors.left(V), Q @ V),
        (reflectors.left_transposed(V, out), Q.T @ V),
        (out, Q.T @ V),
        (reflectors.right(V.T), V.T @ Q),
        (reflectors.right_transposed(V.T), V.T @ Q.T),
    ):
        torch.testing.assert_close(found, expected)
    M = draw(n, n, seed=seed + 2)
    M = M @ M.T
    torch.testing.assert_close(reflectors.diagonal_of(M), (Q.T @ M @ Q).diagonal())


def test_products_in_place() -> None:
    reflectors, V = Reflectors.beginning_with(torch.linalg.qr(draw(6, 2)).Q), draw(6, 6)
    for name in ("left", "left_transposed", "right", "right_transposed"):
        expected, found = getattr(reflectors, name)(V), V.clone()
        getattr(reflectors, name)(found, found)
        torch.testing.assert_close(found, expected)


def test_columns_that_are_unit_vectors_need_no_reflection_and_get_one() -> None:
    """LAPACK leaves such a column out; a reflection that flips its sign is as orthogonal."""
    reflectors = Reflectors.beginning_with(torch.eye(5, dtype=torch.float64)[:, :3])
    Q = reflectors.to_dense()
    torch.testing.assert_close(Q.abs(), torch.eye(5, dtype=torch.float64))


def test_the_other_columns_stay_near_unit_vectors() -> None:
    U = torch.linalg.qr(draw(200, 3)).Q
    Q = Reflectors.beginning_with(U).to_dense()
    assert (Q - torch.eye(200, dtype=Q.dtype))[:, 3:].norm(dim=0).median() < 0.5


def test_another_dtype() -> None:
    reflectors = Reflectors.beginning_with(torch.linalg.qr(draw(6, 2)).Q).to(torch.float32)
    assert reflectors.dtype == torch.float32 and reflectors.left(draw(6, 2).float()).dtype == torch.float32
