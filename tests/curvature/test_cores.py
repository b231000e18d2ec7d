"""The chain's inverse with wide factors as low rank plus a diagonal, against F̃ of just those factors, dense."""

import pytest
import torch
from curvature.oracle import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import natgrad as ng
from natgrad.curvature.base import Factors, to_dense
from natgrad.curvature.block_inverse import LowRankInverse
from natgrad.curvature.cores import Started
from natgrad.curvature.pairs import pair_key
from natgrad.linalg import LowRank
from natgrad.linalg.low_rank import DiagonalMinusLowRank, leading_subspace
from natgrad.optim.chain_inverses import ChainInverses

GAMMA2 = 0.05


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimated(widths: list[int], examples: int, seed: int) -> tuple[tuple[str, ...], dict[str, Factors]]:
    x = draw(examples, widths[0], seed=seed)
    k = ng.kronecker_fisher(
        Net(widths, seed=seed), ng.Gaussian(), x, structure="block_tridiagonal", expectation="exact"
    )
    return k._chain.names, {**k.factors, **{pair_key(*pair): f for pair, f in k.pairs.items()}}


def inverses_of(
    order: tuple[str, ...], factors: dict[str, Factors], form: ng.FactoredTikhonov, refreshes: int = 1
) -> ChainInverses:
    inverses = ChainInverses(form, {n: (len(factors[n].G), len(factors[n].A)) for n in order})
    for _ in range(refreshes):
        inverses.refresh(factors, GAMMA2)
    assert inverses.failures == 0
    return inverses


def dense(inverses: ChainInverses) -> Tensor:
    """The inverse from its products with unit vectors, as K-FAC makes them."""
    sizes = inverses.sizes
    columns = []
    for unit in torch.eye(sum(a * b for a, b in sizes.values()), dtype=torch.float64):
        parts = unit.split([a * b for a, b in sizes.values()])
        V = {n: part.view(b, a).T.contiguous() for part, (n, (a, b)) in zip(parts, sizes.items(), strict=True)}
        U = {n: torch.full_like(v, torch.nan) for n, v in V.items()}
        for name in inverses.names:
            inverses.at(name, GAMMA2).write_negative(V[name], U[name])
        inverses.couple(V, U)
        columns.append(-torch.cat([U[n].T.reshape(-1) for n in sizes]))
    return torch.stack(columns, 1)


def stand_in(M: Tensor, solver: LowRank) -> tuple[Tensor, Tensor]:
    """What stands for a factor, and the projection of its cross factors."""
    if not solver.applies(len(M)):
        return M, torch.eye(len(M), dtype=M.dtype)
    U, values = leading_subspace(M, solver.rank, solver.steps)
    low = (U * values) @ U.T
    return low + torch.diag((M - low).diagonal().clamp(min=0)), U @ U.T


def f_tilde(order: tuple[str, ...], factors: dict[str, Factors], solver: LowRank) -> dict[tuple[int, int], Tensor]:
    """The blocks (i, i) and (i, i + 1) of F̃, damped."""
    blocks, projections = {}, {}
    for i, name in enumerate(order):
        A, G = to_dense(factors[name].A), to_dense(factors[name].G)
        pi = float((A.trace() / len(A) / (G.trace() / len(G))).sqrt())
        (A, PA), (G, PG) = stand_in(A, solver), stand_in(G, solver)
        eye_a, eye_g = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
        blocks[i, i] = torch.kron(A + pi * GAMMA2**0.5 * eye_a, G + GAMMA2**0.5 / pi * eye_g)
        projections[i] = PA, PG
        if i:
            cross = factors[pair_key(order[i - 1], name)]
            (below_A, below_G) = projections[i - 1]
            blocks[i - 1, i] = torch.kron(below_A @ cross.A @ PA, below_G @ cross.G @ PG)
    return blocks


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    rank=st.integers(1, 3),
    examples=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_f_hat_of_these_factors(widths: list[int], rank: int, examples: int, seed: int) -> None:
    """Its inverse is zero beyond the neighbours; F̂ itself is F̃ on the tridiagonal blocks."""
    order, factors = estimated(widths, examples, seed)
    solver = LowRank(rank, steps=3)
    inverse = dense(inverses_of(order, factors, ng.FactoredTikhonov(solver=solver)))
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-8, atol=1e-8 * float(inverse.abs().max()))
    expected = f_tilde(order, factors, solver)
    sizes = [len(expected[i, i]) for i in range(len(order))]
    F = torch.linalg.inv(inverse)
    rows = [row.split(sizes, 1) for row in F.split(sizes)]
    beyond = [row.split(sizes, 1) for row in inverse.split(sizes)]
    scale = float(F.abs().max())
    for (i, j), block in expected.items():
        torch.testing.assert_close(rows[i][j], block, rtol=1e-8, atol=1e-8 * scale)
        torch.testing.assert_close(rows[j][i], block.T, rtol=1e-8, atol=1e-8 * scale)
    far = [beyond[i][j] for i in range(len(order)) for j in range(len(order)) if abs(i - j) > 1]
    assert all(float(block.abs().max()) == 0 for block in far)
    assert torch.linalg.eigvalsh(0.5 * (inverse + inverse.T))[0] > 0


def test_all_kinds_of_layers_occur() -> None:
    """Wide and narrow factors in all four combinations, and a narrow layer whose inverse an edge applies along."""
    order, factors = estimated([7, 6, 3, 2, 2, 6, 3], 40, 0)
    solver = LowRank(3, steps=2)
    inverses = inverses_of(order, factors, ng.FactoredTikhonov(solver=solver))
    kinds = {n: tuple(isinstance(M, DiagonalMinusLowRank) for M in (k.A, k.G)) for n, k in inverses._kept.items()}
    assert set(kinds.values()) == {(True, True), (True, False), (False, False), (False, True)}
    assert inverses._carried and all(kinds[name] == (False, False) for name in inverses._carried)
    inverse, expected = dense(inverses), f_tilde(order, factors, solver)
    F = torch.linalg.inv(inverse)
    start = [0]
    for i in range(len(order)):
        start.append(start[-1] + len(expected[i, i]))
    for (i, j), block in expected.items():
        found = F[start[i] : start[i + 1], start[j] : start[j + 1]]
        torch.testing.assert_close(found, block, rtol=1e-8, atol=1e-9 * float(F.abs().max()))


def test_subspaces_continue_from_the_refresh_before() -> None:
    order, factors = estimated([8, 7, 6], 50, 1)
    form = ng.FactoredTikhonov(solver=LowRank(3))
    once, often, long = (
        dense(inverses_of(order, factors, f, n))
        for f, n in ((form, 1), (form, 12), (ng.FactoredTikhonov(solver=LowRank(3, steps=60)), 1))
    )
    assert (often - long).norm() < 0.02 * (once - long).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_buffer_of_another_dtype(dtype: torch.dtype) -> None:
    order, factors = estimated([8, 7, 6], 50, 1)
    inverses = inverses_of(order, factors, ng.FactoredTikhonov(solver=LowRank(3)))
    block = inverses._kept[order[0]]
    assert isinstance(block, LowRankInverse)
    V = draw(7, 9).to(dtype)
    into = torch.full_like(V, torch.nan)
    started = Started(block, V, into)
    started.finish()
    assert into.dtype == dtype
    torch.testing.assert_close(into, -block.apply(V))
