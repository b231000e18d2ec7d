"""Warm-started inverses and low rank plus diagonal, against dense inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from natgrad.linalg import iterative
from natgrad.linalg.iterative import NewtonSchulz, warm_inverse
from natgrad.linalg.low_rank import DiagonalMinusLowRank, LowRank, leading_subspace


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    m = draw(n, 2 * n, seed=seed, dtype=dtype)
    return m @ m.T / (2 * n)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 12), st.floats(0.0, 0.1))
def test_a_warm_start_near_by_gives_the_inverse(n, change) -> None:
    M, damping = spd(n), 0.1
    start = torch.linalg.inv(M + damping * torch.eye(n, dtype=M.dtype))
    new = (1 - change) * M + change * spd(n, seed=1)
    expected = torch.linalg.inv(new + damping * torch.eye(n, dtype=M.dtype))
    found = NewtonSchulz(iterations=8, tolerance=1e-10).inverse(new, damping, start)
    assert bool(found.ok)
    torch.testing.assert_close(found.value, expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(found.value, found.value.T)


def test_the_residual_is_squared_and_the_tolerance_kept() -> None:
    M = spd(10) + 0.1 * torch.eye(10, dtype=torch.float64)
    start = torch.linalg.inv(1.2 * M)  # I − M X = I / 6
    for iterations in (1, 2, 3):
        assert warm_inverse(M, 0.0, start, iterations, tolerance=(1 / 6) ** (2**iterations) * 0.99) is None
        found = warm_inverse(M, 0.0, start, iterations, tolerance=(1 / 6) ** (2**iterations) * 1.01)
        assert found is not None
        residual = (torch.eye(10, dtype=M.dtype) - M @ found).norm() / 10**0.5
        assert float(residual) == pytest.approx((1 / 6) ** (2**iterations))


@pytest.mark.parametrize("kind", ["none", "far", "very far", "nan", "shape", "dtype", "slow"])
def test_falls_back_to_cholesky(kind, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        iterative, "spd_inverse", lambda *a: calls.append(1) or iterative.__dict__["_kept"](*a), raising=True
    )
    from natgrad.linalg.spd import spd_inverse

    monkeypatch.setattr(iterative, "_kept", spd_inverse, raising=False)
    M = spd(6)
    inverse = torch.linalg.inv(M + 0.1 * torch.eye(6, dtype=M.dtype))
    starts = {
        "none": None,
        "far": 3 * inverse,  # an eigenvalue of −2: the iteration would diverge
        "very far": 1e6 * inverse,
        "nan": inverse * torch.nan,
        "shape": inverse[:3, :3],
        "dtype": inverse.float(),
        "slow": 0.01 * inverse,  # 0.99 takes ten steps
    }
    found = NewtonSchulz(iterations=8 if kind == "very far" else 3).inverse(M, 0.1, starts[kind])
    assert calls == [1] and bool(found.ok)
    torch.testing.assert_close(found.value, inverse)
    broken = NewtonSchulz().inverse(M * torch.nan, 0.1, inverse)
    assert not bool(broken.ok)


def test_single_precision_keeps_its_tolerance() -> None:
    M = spd(50, dtype=torch.float32)
    start = torch.linalg.inv(1.1 * M + 0.01 * torch.eye(50))
    found = NewtonSchulz(3, 1e-4).inverse(M, 0.01, start)
    assert (torch.eye(50) - (M + 0.01 * torch.eye(50)) @ found.value).norm() / 50**0.5 < 2e-4


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 8), st.floats(1e-3, 1.0))
def test_low_rank_plus_multiple_of_the_identity_is_inverted_exactly(rank, more, damping) -> None:
    n = 2 * rank + more
    U = draw(n, rank)
    M = U @ U.T
    inverse, ok = LowRank(rank).inverse(M, damping)
    expected = torch.linalg.inv(M + damping * torch.eye(n, dtype=M.dtype))
    assert bool(ok)
    torch.testing.assert_close(inverse.to_dense(), expected, rtol=1e-6, atol=1e-6 / damping)
    V = draw(n, 3, seed=1)
    torch.testing.assert_close(inverse.left(V), inverse.to_dense() @ V)
    torch.testing.assert_close(inverse.right(V.T), V.T @ inverse.to_dense())


def test_what_the_subspace_leaves_stays_on_the_diagonal() -> None:
    Q = torch.linalg.qr(draw(12, 12)).Q
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.linspace(0.3, 0.1, 9)]).double()
    M = Q @ torch.diag(values) @ Q.T
    inverse, _ = LowRank(3, steps=20).inverse(M, 0.05)
    U = Q[:, :3]
    low = U @ torch.diag(values[:3]) @ U.T
    twin = low + torch.diag((M - low).diagonal() + 0.05)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(twin))


def test_subspace_iteration_continues_from_the_subspace_before() -> None:
    Q = torch.linalg.qr(draw(20, 20)).Q
    values = torch.tensor([3.0, 2.0, *([1.0] * 18)], dtype=torch.float64)
    M = Q @ torch.diag(values) @ Q.T
    errors = []
    inverse = None
    for _ in range(12):
        inverse, _ = LowRank(2).inverse(M, 0.1, inverse)
        U, found = leading_subspace(M, 2, 1, inverse.W / inverse.d[:, None])
        errors.append(float((U @ U.T - Q[:, :2] @ Q[:, :2].T).norm()))
    assert errors[-1] < 1e-2 * errors[0] and errors == sorted(errors, reverse=True)
    torch.testing.assert_close(found, values[[1, 0]], rtol=1e-4, atol=1e-4)


def test_not_finite_is_said() -> None:
    assert not bool(LowRank(2).inverse(spd(6) * torch.nan, 0.1)[1])
    start = DiagonalMinusLowRank(torch.ones(6).double(), torch.full((6, 2), torch.nan).double())
    inverse, ok = LowRank(2).inverse(spd(6), 0.1, start)  # starts anew
    assert bool(ok) and inverse.to_dense().isfinite().all()


def test_settings_out_of_range() -> None:
    for wrong in ({"iterations": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}):
        with pytest.raises(ValueError, match="NewtonSchulz"):
            NewtonSchulz(**wrong)
    for wrong in ({"rank": 0}, {"rank": 2, "steps": 0}):
        with pytest.raises(ValueError, match="LowRank"):
            LowRank(**wrong)
    assert LowRank(3).applies(6) and not LowRank(3).applies(5)
