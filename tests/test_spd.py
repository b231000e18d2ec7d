"""Cholesky, inverses and eigenvectors against torch.linalg on ordinary, singular and broken matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.linalg import safe_cholesky, safe_eigh, spd_inverse


def spd(n: int, rank: int | None = None, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, rank or n + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x @ x.T / x.shape[1]).to(dtype)


@given(n=st.integers(1, 8), seed=st.integers(0, 1000), damping=st.floats(1e-3, 10))
def test_inverse_of_the_damped_matrix(n, seed, damping):
    M = spd(n, rank=max(1, n - 2), seed=seed)
    before = M.clone()
    inverse, ok = spd_inverse(M, damping)
    assert ok
    torch.testing.assert_close(inverse @ (M + damping * torch.eye(n, dtype=M.dtype)), torch.eye(n, dtype=M.dtype))
    assert torch.equal(inverse, inverse.T)
    assert torch.equal(M, before)


def test_inverse_takes_a_tensor_as_damping():
    M = spd(4)
    assert torch.equal(spd_inverse(M, torch.tensor(0.5)).value, spd_inverse(M, 0.5).value)


def test_singular_inverse_is_flagged_or_raises_with_a_proposal():
    M = spd(5, rank=2)
    M[:, 0] = M[0, :] = 0  # a dead input pixel
    assert not spd_inverse(M).ok
    with pytest.raises(ValueError, match=r"A of layer 'fc' \(5, 5\) is singular.*for example [0-9.]+e-") as error:
        spd_inverse(M, check=True, what="A of layer 'fc'")
    proposal = float(str(error.value).rsplit(" ", 1)[1])
    assert spd_inverse(M, proposal, check=True).ok


def test_numerically_singular_inverse_raises_when_checked():
    with pytest.raises(ValueError, match="singular"):
        spd_inverse(spd(6, rank=3), 1e-18, check=True)


def test_float32_inverse_survives_lost_definiteness():
    M = torch.ones(40, 40) * 1e6
    M[0, 0] -= 0.01  # indefinite by rounding alone once 1e-3 is added
    M = M + torch.eye(40) * 0.05
    inverse, ok = spd_inverse(M, 0.1)
    assert ok and inverse.dtype == torch.float32 and torch.isfinite(inverse).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_matrices_are_flagged_not_raised(bad):
    M = spd(4)
    M[1, 1] = bad
    assert not spd_inverse(M, 1.0).ok
    assert not safe_cholesky(M).ok
    found = safe_eigh(M)
    assert not found.ok and found.vectors.isnan().all()
    for function in (lambda: spd_inverse(M, 1.0, check=True), lambda: safe_eigh(M, check=True)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            function()


def test_cholesky():
    M = spd(6)
    L, ok = safe_cholesky(M)
    assert ok
    torch.testing.assert_close(L @ L.T, M)
    with pytest.raises(ValueError, match="singular"):
        safe_cholesky(-M, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh(dtype):
    M = spd(7, rank=4, dtype=dtype)
    values, vectors, ok = safe_eigh(M)
    assert ok and ok.dtype == torch.bool and ok.ndim == 0 and values.dtype == vectors.dtype == dtype
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, M)
    assert (values.diff() >= 0).all()


def test_eigh_retries_in_double_precision(monkeypatch):
    """Float32 eigh has returned NaN for a finite 785 x 785 second moment of MNIST; here it is made to."""
    real = torch.linalg.eigh
    asked = []

    def broken(M):
        asked.append(M.dtype)
        values, vectors = real(M)
        return (values * torch.nan, vectors) if M.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    M = spd(5, dtype=torch.float32)
    values, vectors, ok = safe_eigh(M)
    assert ok and asked == [torch.float32, torch.float64] and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, M)
