"""The inverse of the hot path against Ξᵀ Λ Ξ, which is tested against the definitions."""

import pytest
import torch
from curvature.oracle import Net
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import natgrad as ng
from natgrad.curvature.base import Factors
from natgrad.curvature.cores import CoupledInverse, carriers, invert_chain
from natgrad.curvature.edges import canonical
from natgrad.curvature.pairs import pair_key


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimated(net: Net, x: Tensor) -> tuple[ng.curvature.KroneckerCurvature, tuple[str, ...], dict[str, Factors]]:
    k = ng.kronecker_fisher(net, ng.Gaussian(), x, structure="block_tridiagonal", expectation="exact")
    return k, k._chain.names, {**k.factors, **{pair_key(*pair): f for pair, f in k.pairs.items()}}


def applied(inverse: CoupledInverse, order: tuple[str, ...], V: dict[str, Tensor]) -> dict[str, Tensor]:
    U = {name: inverse.blocks[name].apply(V[name]).neg() for name in order}
    for lower, upper in zip(order[:-1], order[1:], strict=True):
        edge = inverse.edges[pair_key(lower, upper)]
        edge.subtract([V[lower], V[upper]], [U[lower], U[upper]])
    return {name: -u for name, u in U.items()}


def stacked(V: dict[str, Tensor], order: tuple[str, ...]) -> Tensor:
    return torch.cat([V[name].T.reshape(-1) for name in order])


@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=7),
    examples=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_papers_form(widths: list[int], examples: int, bias: bool, seed: int) -> None:
    net, x = Net(widths, bias=bias, seed=seed), draw(examples, widths[0], seed=seed)
    k, order, factors = estimated(net, x)
    rule = ng.FactoredTikhonov()
    inverse = invert_chain(order, factors, 0.05, rule)
    assert inverse.ok and all(edge.clipped == 0 for edge in inverse.edges.values())
    V = {n: draw(*(len(factors[n].G), len(factors[n].A)), seed=i) for i, n in enumerate(order)}
    found, dense = stacked(applied(inverse, order, V), order), k._chain.inverse(0.05, rule).to_dense()
    expected = dense @ stacked(V, order)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=7), seed=st.integers(0, 99))
def test_an_edge_applies_the_inverse_of_its_smaller_layer_along(widths: list[int], seed: int) -> None:
    net, x = Net(widths, seed=seed), draw(8, widths[0], seed=seed)
    _, order, factors = estimated(net, x)
    inverse = invert_chain(order, factors, 0.05, ng.FactoredTikhonov())
    V = {n: draw(*(len(factors[n].G), len(factors[n].A)), seed=i) for i, n in enumerate(order)}
    expected, carried = applied(inverse, order, V), carriers(order, inverse.blocks, inverse.edges)
    U = {n: inverse.blocks[n].apply(V[n]).neg() if n not in carried else torch.zeros_like(V[n]) for n in order}
    for pair in zip(order[:-1], order[1:], strict=True):
        edge = inverse.edges[pair_key(*pair)]
        whole = edge.whole is not None and carried.get(pair[edge.whole]) == pair_key(*pair)
        edge.subtract([V[n] for n in pair], [U[n] for n in pair], whole=whole)
    for name in order:
        torch.testing.assert_close(-U[name], expected[name], rtol=1e-8, atol=1e-9 * float(expected[name].abs().max()))


def test_layers_of_an_autoencoder_that_an_edge_carries() -> None:
    net, x = Net([8, 6, 4, 2, 4, 6, 8]), draw(9, 8)
    _, order, factors = estimated(net, x)
    inverse = invert_chain(order, factors, 0.05, ng.FactoredTikhonov())
    found = carriers(order, inverse.blocks, inverse.edges)
    expected = {order[1]: order[:2], order[2]: order[1:3], order[3]: order[3:5], order[4]: order[4:6]}
    assert found == {name: pair_key(*pair) for name, pair in expected.items()}


def test_single_precision() -> None:
    net, x = Net([9, 7, 3, 5, 8]), draw(30, 9)
    k, order, factors = estimated(net, x)
    single = {name: Factors(f.A.float(), f.G.float()) for name, f in factors.items()}
    inverse = invert_chain(order, single, 0.01, ng.FactoredTikhonov())
    V = {n: draw(len(factors[n].G), len(factors[n].A), seed=i) for i, n in enumerate(order)}
    found = stacked(applied(inverse, order, {n: v.float() for n, v in V.items()}), order)
    expected = k._chain.inverse(0.01, ng.FactoredTikhonov()).to_dense() @ stacked(V, order)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_canonical_coordinates() -> None:
    joint = draw(9, 20) @ draw(9, 20).T
    lower, cross, upper = joint[:5, :5], joint[:5, 5:], joint[5:, 5:]
    s2 = torch.linalg.eigvals(torch.linalg.solve(upper, cross.T @ torch.linalg.solve(lower, cross))).real.sort().values
    inverses = torch.linalg.inv(lower), torch.linalg.inv(upper)
    eye, S = torch.eye(4, dtype=torch.float64), torch.diag(s2)
    found, ok = canonical(lower, cross, upper, *inverses)
    assert ok and not found.whitens_lower
    torch.testing.assert_close(found.squares, s2)
    for C, X, Y in ((cross, found.X, found.Y),):
        torch.testing.assert_close(X.T @ lower @ X, S, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(Y.T @ upper @ Y, eye, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(X.T @ C @ Y, S, rtol=1e-9, atol=1e-10)
    turned, _ = canonical(upper, cross.T, lower, *inverses[::-1])
    assert turned.whitens_lower
    torch.testing.assert_close(turned.X, found.Y)
    torch.testing.assert_close(turned.Y, found.X)


def test_eigenvalues_that_rounding_makes_negative_are_clipped_counted_and_harmless() -> None:
    """Cross factors of other samples than the diagonal ones: 1 − s₁ s₂ < 0. The inverse stays positive definite."""
    net, x = Net([4, 5, 3]), draw(12, 4)
    _, order, factors = estimated(net, x)
    pair = pair_key(*order)
    broken = {**factors, pair: Factors(factors[pair].A * 1.2, factors[pair].G * 1.2)}
    inverse = invert_chain(order, broken, 1e-4, ng.FactoredTikhonov())
    edge = inverse.edges[pair]
    squares = torch.outer(edge.G.squares, edge.A.squares)
    assert edge.clipped == (squares > 1).sum() > 0
    assert inverse.ok
    sizes = {n: (len(factors[n].G), len(factors[n].A)) for n in order}
    total = sum(a * b for a, b in sizes.values())
    columns = []
    for unit in torch.eye(total, dtype=torch.float64):
        parts = unit.split([a * b for a, b in sizes.values()])
        V = {n: part.view(b, a).T for part, (n, (a, b)) in zip(parts, sizes.items(), strict=True)}
        columns.append(stacked(applied(inverse, order, V), order))
    dense = torch.stack(columns, 1)
    torch.testing.assert_close(dense, dense.T, rtol=1e-6, atol=1e-6 * float(dense.abs().max()))
    assert torch.linalg.eigvalsh(0.5 * (dense + dense.T))[0] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_factors_are_reported(bad: float) -> None:
    net, x = Net([3, 2, 4]), draw(6, 3)
    _, order, factors = estimated(net, x)
    for name in factors:
        A = factors[name].A.clone()
        A[0, 0] = bad
        broken = {**factors, name: Factors(A, factors[name].G)}
        assert not invert_chain(order, broken, 0.1, ng.FactoredTikhonov()).ok
