"""Deferred combinations against the same recurrence carried out at once."""

import pytest
import torch
from scipy.sparse import diags_array
from scipy.sparse.linalg import minres as scipy_minres

from natgrad.linalg import minres_qlp
from natgrad.linalg.deferred import DeferredVectors


@pytest.mark.parametrize("room", [3, 4, 7])
@pytest.mark.parametrize("n", [1, 2**15, 2**15 + 3])
def test_combinations_equal_the_recurrence(room, n):
    """a ← a + 2 b − v and b ← b / 2 + 3 v, more new vectors than there is room for; some blocks are not full."""
    g = torch.Generator().manual_seed(0)
    new = torch.randn(12, n, generator=g, dtype=torch.float64)
    a, b = torch.zeros(2, n, dtype=torch.float64)
    vectors = DeferredVectors(new[0], 2, room)
    for i, v in enumerate(new):
        vectors.place().copy_(v)
        column, rows = vectors.append(), vectors.coefficients
        rows[0] += 2 * rows[1]
        rows[0, column] -= 1
        rows[1] /= 2
        rows[1, column] += 3
        a, b = a + 2 * b - v, b / 2 + 3 * v
        torch.testing.assert_close(vectors.form(rows[0]), a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(vectors.form(rows[1] - rows[0]), b - a, rtol=1e-12, atol=1e-12)
        assert torch.equal(vectors.newest(1), v)
        if i:
            assert torch.equal(vectors.newest(2), new[i - 1])
        assert vectors.used <= 2 + room


def test_a_place_that_was_not_taken_in_changes_nothing():
    vectors = DeferredVectors(torch.zeros(4, dtype=torch.float64), 1, 3)
    vectors.place().copy_(torch.ones(4))
    vectors.coefficients[0, vectors.append()] = 2.0
    vectors.place().fill_(torch.nan)
    assert torch.equal(vectors.form(vectors.coefficients[0]), 2 * torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_long_vectors_and_many_iterations(preconditioned):
    """More iterations than vectors are kept, and more elements than a block has: the iterates of SciPy's MINRES."""
    n = 2**15 + 50
    g = torch.Generator().manual_seed(1)
    diagonal = torch.randn(n, generator=g, dtype=torch.float64)
    b, inverse = torch.randn(2, n, generator=g, dtype=torch.float64)
    inverse = inverse.abs() + 0.5
    reference, _ = scipy_minres(
        diags_array(diagonal.numpy()), b.numpy(), rtol=0, maxiter=23,
        M=diags_array(inverse.numpy()) if preconditioned else None,
    )  # fmt: skip
    solution = minres_qlp(
        lambda v: diagonal * v, b, tol=0, max_iters=23, store=(9, 23),
        preconditioner=(lambda r: inverse * r) if preconditioned else None,
    )  # fmt: skip
    torch.testing.assert_close(solution.x, torch.from_numpy(reference), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution.residual, b - diagonal * solution.x, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution.residual_norm, solution.residual.norm(), rtol=1e-9, atol=0)
    early = minres_qlp(
        lambda v: diagonal * v, b, tol=0, max_iters=9,
        preconditioner=(lambda r: inverse * r) if preconditioned else None,
    )  # fmt: skip
    torch.testing.assert_close(solution.iterates[9], early.x, rtol=1e-12, atol=1e-13)
