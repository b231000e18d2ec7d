"""(A ⊗ B ± C ⊗ D)^{-1} against dense solves, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import natgrad as ng
from natgrad.linalg.stein import pair_eigh

QUIET = settings(derandomize=True, deadline=None, max_examples=20)
METHODS = ["decomposition", "smith"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(n: int, seed: int, floor: float = 0.3) -> Tensor:
    X = draw(n, n + 1, seed=seed)
    return X @ X.T / n + floor * torch.eye(n, dtype=torch.float64)


def semidefinite(n: int, rank: int, seed: int) -> Tensor:
    X = draw(n, rank, seed=seed)
    return X @ X.T / n


def below(A: Tensor, largest: float, seed: int) -> Tensor:
    """A positive semi-definite C whose largest eigenvalue relative to A is the given one."""
    C = semidefinite(len(A), max(1, len(A) - 1), seed)
    return C * (largest / torch.linalg.eigvals(torch.linalg.solve(A, C)).real.max())


def problem(a: int, b: int, s1: float = 0.9, s2: float = 0.8, seed: int = 0) -> tuple[Tensor, ...]:
    A, B = definite(a, seed), definite(b, seed + 1)
    return A, B, below(A, s1, seed + 2), below(B, s2, seed + 3)


def dense(A: Tensor, B: Tensor, C: Tensor, D: Tensor, sign: int) -> Tensor:
    return torch.kron(A, B) + sign * torch.kron(C, D)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [1, -1])
@given(a=st.integers(1, 6), b=st.integers(1, 6), k=st.integers(1, 4), seed=st.integers(0, 1000))
@QUIET
def test_against_a_dense_solve(method: str, sign: int, a: int, b: int, k: int, seed: int) -> None:
    matrices = problem(a, b, seed=seed)
    op = ng.linalg.KroneckerSum(*matrices, sign=sign)
    M = dense(*matrices, sign)
    v = draw(a * b, k, seed=seed + 9)
    torch.testing.assert_close(op.to_dense(), M)
    torch.testing.assert_close(op @ v, M @ v)
    inverse = op.inverse(method)
    assert inverse.method == method and inverse.clipped == 0 and inverse.shape == M.shape
    expected = torch.linalg.solve(M, v)
    torch.testing.assert_close(inverse @ v, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(inverse @ v[:, 0], expected[:, 0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(inverse.to_dense() @ M, torch.eye(a * b, dtype=M.dtype), rtol=1e-9, atol=1e-9)
    V = v[:, 0].reshape(a, b).T  # the columns of V stacked are v
    torch.testing.assert_close(inverse.apply(V).T.reshape(-1), expected[:, 0], rtol=1e-9, atol=1e-11)
    U = inverse.apply(V)
    A, B, C, D = matrices
    torch.testing.assert_close(B @ U @ A.T + sign * D @ U @ C.T, V)


@pytest.mark.parametrize("sign", [1, -1])
@given(a=st.integers(1, 5), b=st.integers(1, 5), alpha=st.floats(0.1, 5), beta=st.floats(0.1, 5))
@QUIET
def test_scaled_identities(sign: int, a: int, b: int, alpha: float, beta: float) -> None:
    """(ξ I ⊗ I ± C ⊗ D)^{-1}, ξ = α β."""
    C, D = semidefinite(a, a, 1), semidefinite(b, b, 2)
    largest = (torch.linalg.eigvalsh(C)[-1] * torch.linalg.eigvalsh(D)[-1]).item()
    C = C * (0.7 * alpha * beta / largest)
    eye = torch.eye(a * b, dtype=torch.float64)
    op = ng.linalg.KroneckerSum(alpha, torch.tensor(beta, dtype=torch.float64), C, D, sign=sign)
    M = alpha * beta * eye + sign * torch.kron(C, D)
    torch.testing.assert_close(op.to_dense(), M)
    torch.testing.assert_close(op @ eye, M)
    for method in METHODS:
        found = op.inverse(method)
        assert found.method == method
        torch.testing.assert_close(found.to_dense(), torch.linalg.inv(M), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("method", METHODS)
def test_nearly_singular_differences(gap: float, method: str) -> None:
    """max s₁ s₂ = 1 - gap; the unbalanced pair 1e4, 1e-4 overflows where powers are taken carelessly."""
    for s1 in (1.0, 1e4):
        matrices = problem(4, 3, s1, (1 - gap) / s1)
        inverse = ng.linalg.KroneckerSum(*matrices, sign=-1).inverse(method)
        M = dense(*matrices, -1)
        assert inverse.method == method
        v = draw(12, seed=5)
        u = inverse @ v
        assert (M @ u - v).norm() < 1e-14 / gap * v.norm() + 1e-11 * v.norm()
        torch.testing.assert_close(u, torch.linalg.solve(M, v), rtol=1e-13 / gap + 1e-10, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_smith_gives_way_where_it_would_diverge(sign: int) -> None:
    A, B, C, D = problem(3, 4, 1.5, 0.8)
    op = ng.linalg.KroneckerSum(A, B, C, D, sign=sign)
    if sign < 0:
        with pytest.raises(ValueError, match="not positive definite"):
            op.inverse("smith")
        return
    inverse = op.inverse("smith")
    assert inverse.method == "decomposition"
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(dense(A, B, C, D, 1)), rtol=1e-9, atol=1e-11)


def test_smith_of_a_zero_partner() -> None:
    A, B, C, D = problem(3, 2)
    for C_, D_ in ((0 * C, D), (C, 0 * D)):
        op = ng.linalg.KroneckerSum(A, B, C_, D_, sign=-1)
        torch.testing.assert_close(op.inverse("smith").to_dense(), torch.linalg.inv(torch.kron(A, B)))


def test_what_is_not_positive_definite_is_refused_or_clipped_and_counted() -> None:
    A, B, C, D = problem(3, 3, 1.0, 1.0)
    s = [torch.linalg.eigvals(torch.linalg.solve(M, N)).real for M, N in ((A, C), (B, D))]
    singular = ng.linalg.KroneckerSum(A, B, C, D, sign=-1)
    with pytest.raises(ValueError, match=r"not positive definite.*smallest eigenvalue.*clip=1e-6"):
        singular.inverse()
    beyond = ng.linalg.KroneckerSum(A, B, 1.3 * C, D, sign=-1)
    with pytest.raises(ValueError, match=r"smallest eigenvalue is -3\.0e-01"):
        beyond.inverse()
    expected = (1 - 1.3 * torch.outer(s[1], s[0]) < 0.2).sum()
    assert expected > 0
    clipped = beyond.inverse(clip=0.2)
    assert clipped.clipped == expected
    relative = torch.linalg.eigvals(torch.kron(A, B) @ clipped.to_dense()).real  # of the inverse, relative to A ⊗ B
    assert relative.max() == pytest.approx(1 / 0.2)
    assert relative.min() == pytest.approx(1.0)


def test_both_of_the_first_pair_must_be_definite() -> None:
    A, B, C, D = problem(3, 2)
    for broken in ((semidefinite(3, 2, 8), B), (A, semidefinite(2, 1, 8))):
        for method in METHODS:
            with pytest.raises(ValueError, match="singular to working precision|not positive definite"):
                ng.linalg.KroneckerSum(*broken, C, D, sign=1).inverse(method)
    with pytest.raises(ValueError, match="A=-1: expected a positive multiple"):
        ng.linalg.KroneckerSum(-1.0, B, C, D).inverse()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_is_not_symmetric_is_refused_and_multiplied_rightly(which: int, method: str) -> None:
    """Half of it would be read: the inverse would be that of another matrix."""
    matrices = list(problem(3, 2))
    matrices[which] = matrices[which] + 0.05 * draw(*matrices[which].shape, seed=7)
    op = ng.linalg.KroneckerSum(*matrices)
    v = draw(6, 2, seed=8)
    torch.testing.assert_close(op @ v, dense(*matrices, 1) @ v)
    with pytest.raises(ValueError, match=f"{'ABCD'[which]}: expected a symmetric matrix.*differ by up to"):
        op.inverse(method)
    for dtype in (torch.float32, torch.float64):  # rounding of single precision is none of that
        op = ng.linalg.KroneckerSum(*((M * (1 + 1e-6 * draw(*M.shape))).to(dtype) for M in problem(3, 2)))
        op.inverse(method)


def test_bad_input() -> None:
    A, B, C, D = problem(3, 2)
    for make, message in (
        (lambda: ng.linalg.KroneckerSum(A, B, C, D, sign=0), "sign=0: expected"),
        (lambda: ng.linalg.KroneckerSum(A, B, C[:, :2], D), r"C: expected a square matrix, got shape \[3, 2\]"),
        (lambda: ng.linalg.KroneckerSum(A, A, C, D), r"B: expected the shape of D, \[2, 2\], got \[3, 3\]"),
        (lambda: ng.linalg.KroneckerSum(A, B.float(), C, D), "one dtype and device"),
        (lambda: ng.linalg.KroneckerSum(A, B, C, D).inverse("newton"), "method='newton'"),
        (lambda: ng.linalg.KroneckerSum(A, B, C, D).inverse(clip=0.0), "clip=0.0: expected a positive"),
        (lambda: ng.linalg.KroneckerSum(A, B, C, D).inverse() @ draw(5), r"shape \[6\] or \[6, k\], got \[5\]"),
        (lambda: ng.linalg.KroneckerSum(A, B, C, D) @ draw(6).float(), "expected v of dtype torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="C: expected a square matrix as a tensor, got float"):
        ng.linalg.KroneckerSum(A, B, 1.0, D)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match="B: expected a square matrix as a tensor, or a number .* got list"):
        ng.linalg.KroneckerSum(A, [[1.0]], C, D)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="C: expected real floating-point numbers, got torch.int64"):
        ng.linalg.KroneckerSum(A, B, C.long(), D)


@given(n=st.integers(1, 7), rank=st.integers(0, 7), seed=st.integers(0, 100))
@QUIET
def test_pair_eigh(n: int, rank: int, seed: int) -> None:
    A, C = definite(n, seed), semidefinite(n, min(rank, n), seed + 1)
    K, s, ok = pair_eigh(A, C)
    assert ok
    torch.testing.assert_close(K.T @ A @ K, torch.eye(n, dtype=A.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(K.T @ C @ K, torch.diag(s), rtol=1e-10, atol=1e-10)
