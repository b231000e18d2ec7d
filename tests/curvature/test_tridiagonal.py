"""F̂ and its inverse against dense constructions from the definitions of [KFAC, sec. 4.3], in float64."""

import math

import pytest
import torch
from curvature import oracle
from curvature.oracle import Net
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import Diagonal, Statistics
from natgrad.curvature.kfac import collect
from natgrad.curvature.tridiagonal import LayerChain
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import cover
from natgrad.model_view import ModelView

NETS = {
    "two layers": [3, 4, 2],
    "three layers": [4, 3, 5, 2],
    "bottleneck": [4, 3, 2, 1, 2, 3],
    "five layers": [2, 3, 3, 4, 2, 2],
}
LIKELIHOODS = [ng.Gaussian(0.3), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]
TRIDIAGONAL = "block_tridiagonal"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(net, likelihood, x, **options):
    return ng.kronecker_fisher(net, likelihood, x, structure=TRIDIAGONAL, **{"expectation": "exact", **options})


def damped_blocks(net: Net, likelihood, x: Tensor, damping: float) -> list[list[Tensor]]:
    """F̃ by blocks, its diagonal ones ``(A + π γ I) ⊗ (G + γ/π I)``; factors by loops over examples."""
    n, gamma, found = range(len(net.layers)), math.sqrt(damping), oracle.examples(net, likelihood, x)
    count = oracle.count_of(likelihood, net(x))
    blocks = []
    for i in n:
        row = []
        for j in n:
            A = sum(e.a[i].T @ e.a[j] for e in found) / len(x)
            G = sum(e.J[i][:, 0].T @ e.F @ e.J[j][:, 0] for e in found) / count
            if i == j:
                pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
                A, G = A + pi * gamma * eye(len(A)), G + gamma / pi * eye(len(G))
            row.append(torch.kron(A, G))
        blocks.append(row)
    return blocks


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def dense_inverse(F: list[list[Tensor]]) -> Tensor:
    """The precision of the Markov chain whose neighbours have these covariances: Σ pairs − Σ inner nodes."""
    sizes = [len(F[i][i]) for i in range(len(F))]
    start = [sum(sizes[:i]) for i in range(len(F) + 1)]
    total = torch.zeros(start[-1], start[-1], dtype=torch.float64)
    for i in range(len(F) - 1):
        pair = torch.cat([torch.cat(F[k][i : i + 2], 1) for k in (i, i + 1)])
        total[start[i] : start[i + 2], start[i] : start[i + 2]] += torch.linalg.inv(pair)
    for i in range(1, len(F) - 1):
        total[start[i] : start[i + 1], start[i] : start[i + 1]] -= torch.linalg.inv(F[i][i])
    return total


def blocks_of(M: Tensor, net: Net) -> list[list[Tensor]]:
    sizes = [layer.weight.numel() + layer.out_features for layer in net.layers]
    return [list(row.split(sizes, 1)) for row in M.split(sizes)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("widths", NETS.values(), ids=NETS)
@pytest.mark.parametrize("damping", [0.3, 1e-3])
def test_damped_inverse(widths: list[int], likelihood, damping: float) -> None:
    net, x = Net(widths), draw(7, widths[0])
    F = damped_blocks(net, likelihood, x, damping)
    inverse = estimate(net, likelihood, x).inverse(damping)
    dense = inverse.to_dense(order="vec")
    torch.testing.assert_close(dense, dense_inverse(F), rtol=1e-8, atol=1e-8 * float(dense.abs().max()))
    torch.testing.assert_close(dense, dense.T, rtol=1e-9, atol=1e-11 * float(dense.abs().max()))
    hat = blocks_of(torch.linalg.inv(dense), net)
    precision = blocks_of(dense, net)
    for i in range(len(F)):
        for j in range(len(F)):
            if abs(i - j) <= 1:
                torch.testing.assert_close(hat[i][j], F[i][j], rtol=1e-8, atol=1e-8)
            else:
                assert precision[i][j].abs().max() == 0
    assert torch.linalg.eigvalsh(dense)[0] > 0
    v = draw(len(dense), 3, seed=3)
    torch.testing.assert_close(inverse @ v, inverse.to_dense() @ v)
    torch.testing.assert_close(inverse @ v[:, 0], (inverse @ v)[:, 0])


@pytest.mark.parametrize("widths", NETS.values(), ids=NETS)
def test_undamped_operator_agrees_with_the_full_one_on_the_tridiagonal_blocks(widths: list[int]) -> None:
    net, x = Net(widths), draw(9, widths[0])
    k = estimate(net, ng.Gaussian(), x)
    hat, full = (blocks_of(M, net) for M in (k.to_dense(order="vec"), oracle.full(net, ng.Gaussian(), x)))
    for i in range(len(full)):
        for j in range(len(full)):
            if abs(i - j) <= 1:
                torch.testing.assert_close(hat[i][j], full[i][j], rtol=1e-8, atol=1e-8)
    dense = k.to_dense()
    torch.testing.assert_close(dense, dense.T)
    v = draw(len(dense), 2, seed=2)
    torch.testing.assert_close(k @ v, dense @ v)
    assert torch.linalg.eigvalsh(dense)[0] > -1e-9
    # further out: the product of regressions on the layers between
    if len(full) > 2:
        between = torch.linalg.pinv(full[1][1], rtol=1e-12, hermitian=True)
        torch.testing.assert_close(hat[0][2], full[0][1] @ between @ full[1][2], rtol=1e-7, atol=1e-8)


def test_operator_and_inverse_belong_together_where_factors_are_regular() -> None:
    net, x = Net([3, 4, 3, 2], bias=False), draw(40, 3)
    k = estimate(net, ng.Gaussian(), x)
    inverse = k.inverse(0.0)
    torch.testing.assert_close(inverse @ k.to_dense(), eye(len(k.to_dense())), rtol=1e-6, atol=1e-6)


def test_regressions_and_conditional_covariances_against_dense() -> None:
    net, x, damping = Net([3, 4, 2, 3]), draw(6, 3), 0.05
    F = damped_blocks(net, ng.Gaussian(), x, damping)
    n = [len(F[i][i]) for i in range(3)]
    psi = [F[i][i + 1] @ torch.linalg.inv(F[i + 1][i + 1]) for i in range(2)]
    zero = [[torch.zeros(a, b, dtype=torch.float64) for b in n] for a in n]
    xi = torch.cat(
        [
            torch.cat([eye(n[0]), -psi[0], zero[0][2]], 1),
            torch.cat([zero[1][0], eye(n[1]), -psi[1]], 1),
            torch.cat([zero[2][0], zero[2][1], eye(n[2])], 1),
        ]
    )
    sigma = [F[i][i] - psi[i] @ F[i + 1][i + 1] @ psi[i].T for i in range(2)] + [F[2][2]]
    operator = estimate(net, ng.Gaussian(), x).inverse(damping).blocks[0][1]
    torch.testing.assert_close(operator.Xi.to_dense(), xi, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(operator.Xi.T.to_dense(), xi.T, rtol=1e-9, atol=1e-10)
    Lambda = torch.block_diag(*(torch.linalg.inv(s) for s in sigma))
    torch.testing.assert_close(operator.Lambda.to_dense(), Lambda, rtol=1e-8, atol=1e-8)
    v = draw(len(xi), 2, seed=4)
    torch.testing.assert_close(operator.Xi @ v, xi @ v)
    torch.testing.assert_close(operator.Xi.T @ v, xi.T @ v)
    torch.testing.assert_close(operator.Xi.solve(operator.Xi @ v), v)
    torch.testing.assert_close(operator.Xi.solve_transposed(operator.Xi.T @ v), v)
    torch.testing.assert_close(operator @ v, xi.T @ Lambda @ xi @ v)


@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    examples=st.integers(1, 8),
    bias=st.booleans(),
    seed=st.integers(0, 50),
)
def test_edges_the_other_way_give_the_same_inverse(widths: list[int], examples: int, bias: bool, seed: int) -> None:
    net, x = Net(widths, bias=bias, seed=seed), draw(examples, widths[0], seed=seed)
    chain = estimate(net, ng.Gaussian(), x)._chain
    rule = ng.FactoredTikhonov()
    forth, back = (c.inverse(0.1, rule).to_dense() for c in (chain, chain.reversed()))
    sizes = [out * columns for out, columns in chain.sizes()]
    index = list(torch.arange(sum(sizes)).split(sizes))
    order = torch.cat(index[::-1])
    torch.testing.assert_close(back, forth[order][:, order], rtol=1e-8, atol=1e-9 * float(forth.abs().max()))


def test_thirty_layers_and_one() -> None:
    net, x = Net([3] * 31), draw(20, 3)
    k = estimate(net, ng.Gaussian(), x)
    assert len(k.pairs) == 29
    inverse = k.inverse(0.01)
    v = draw(30 * 12, seed=1)
    hat = torch.linalg.inv(inverse.to_dense())
    torch.testing.assert_close(hat @ (inverse @ v), v, rtol=1e-6, atol=1e-7)
    one = Net([3, 2])
    twin = ng.kronecker_fisher(one, ng.Gaussian(), x, structure="block_diagonal")
    k = estimate(one, ng.Gaussian(), x)
    torch.testing.assert_close(k.to_dense(), twin.to_dense())
    torch.testing.assert_close(k.inverse(0.1).to_dense(), twin.inverse(0.1).to_dense())


@pytest.mark.parametrize("expectation", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
def test_all_factors_come_from_the_same_draws(expectation: str, likelihood) -> None:
    """The 2×2 blocks of neighbours are positive semi-definite: 1 − s₁ s₂ ≥ 0, the output layer included."""
    net, x = Net([3, 4, 5, 3], seed=3), draw(5, 3)
    y = torch.arange(5) % 3 if isinstance(likelihood, ng.Categorical) else draw(5, 3, seed=2).sigmoid()
    generator = torch.Generator().manual_seed(0)
    k = estimate(net, likelihood, x, expectation=expectation, y=y, generator=generator)
    assert not any(isinstance(M, Diagonal) for f in k.factors.values() for M in (f.A, f.G))
    for (lower, upper), cross in k.pairs.items():
        for which in ("A", "G"):
            left, right = (getattr(k.factors[name], which) for name in (lower, upper))
            C = getattr(cross, which)
            joint = torch.cat([torch.cat([left, C], 1), torch.cat([C.T, right], 1)])
            assert torch.linalg.eigvalsh(joint)[0] > -1e-12 * joint.trace()
    k.inverse(1e-6)


def test_batches_add_up_and_sequences_pair_rows_by_position() -> None:
    net, x = Net([2, 3, 2], mix=True), draw(6, 3, 2)
    k = estimate(net, ng.Gaussian(), x)
    hat = blocks_of(k.to_dense(order="vec"), net)
    full = blocks_of(oracle.full(net, ng.Gaussian(), x), net)
    torch.testing.assert_close(hat[0][1], full[0][1], rtol=1e-8, atol=1e-8)
    split = estimate(net, ng.Gaussian(), list(x.split([1, 2, 3])))
    torch.testing.assert_close(split.to_dense(), k.to_dense())
    torch.testing.assert_close(split.inverse(0.1).to_dense(), k.inverse(0.1).to_dense())


def test_statistics_keep_their_pairs_in_a_state() -> None:
    net, x = Net([2, 3, 2]), draw(6, 2)
    view = ModelView(net)
    capture = Capture(net, cover(view).layers)
    stats = collect(view, capture, ng.Gaussian(), x, expectation="exact", chain=True)
    again = Statistics.from_state(stats.state())
    assert list(again.layers) == ["layers.0", "layers.1", "layers.0→layers.1"]
    for name, sums in stats.layers.items():
        assert torch.equal(again.layers[name].A, sums.A) and torch.equal(again.layers[name].G, sums.G)


class _Wired(nn.Module):
    """Three layers, registered out of order, wired as told."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        for name in ("last", "first", "middle"):
            setattr(self, name, nn.Linear(2, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        if self.wiring == "parallel":
            return self.last(a + torch.tanh(self.middle(x)))
        b = torch.relu_(self.middle(a))
        if self.wiring == "skip":
            return self.last(a + b)
        if self.wiring == "twice":
            return self.last(torch.tanh(self.middle(b)))
        if self.wiring == "two outputs":
            return self.last(b) + b
        if self.wiring == "unused":
            return b
        return self.last(nn.functional.layer_norm(b, (2,)))


def test_order_follows_the_forward_pass() -> None:
    net, x = _Wired("chain"), draw(5, 2)
    k = estimate(net, ng.Gaussian(), x)
    assert list(k.pairs) == [("first", "middle"), ("middle", "last")]
    net.middle.requires_grad_(False)
    k = estimate(net, ng.Gaussian(), x)
    assert list(k.pairs) == [("first", "last")]


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        ("skip", "layer 'last' takes the outputs of 'first' and 'middle'"),
        ("parallel", "layer 'last' takes the outputs of 'first' and 'middle'"),
        ("twice", "layer 'middle' was used 2 times"),
        ("two outputs", "the output depends directly on 'last' and 'middle'"),
        ("unused", "layer 'last' was used 0 times"),
    ],
)
def test_what_is_no_chain_is_refused(wiring: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"needs a chain of layers.*{message}.*block_diagonal"):
        estimate(_Wired(wiring), ng.Gaussian(), draw(5, 2))


class _Flattening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2, dtype=torch.float64), nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).flatten(1))


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"shapes \[4, 3, 2\] and \[4, 6\].*block_diagonal"):
        estimate(_Flattening(), ng.Gaussian(), draw(4, 3, 2))
    dead = draw(6, 2)
    dead[:, 1] = 0
    k = estimate(Net([2, 3, 2]), ng.Gaussian(), dead)
    for kind in ("exact", ng.ExactTikhonov()):
        with pytest.raises(ValueError, match="kind='exact'.*kind='factored'"):
            k.inverse(0.1, kind=kind)
    with pytest.raises(ValueError, match="singular.*pass a damping"):
        k.inverse(0.0)


def test_a_layer_determined_by_the_next_is_refused_undamped() -> None:
    """A linear hidden layer on its own input: g₁ = Wᵀ g₂ and a₁ = W a₀ make s₁ = s₂ = 1."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    k = estimate(net, ng.Gaussian(), draw(9, 2))
    with pytest.raises(ValueError, match="gradient of layer '0' is determined by that of the next.*larger damping"):
        k.inverse(0.0)
    k.inverse(1e-4)


@given(seed=st.integers(0, 20), frobenius=st.booleans())
def test_norms_of_pi(seed: int, frobenius: bool) -> None:
    """Another π: F̂ still has the damped blocks."""
    rule = ng.FactoredTikhonov(pi="frobenius" if frobenius else "one")
    net, x = Net([2, 3, 2], seed=seed), draw(6, 2, seed=seed)
    k = estimate(net, ng.Gaussian(), x)
    hat = blocks_of(torch.linalg.inv(k.inverse(0.2, kind=rule).to_dense(order="vec")), net)
    for i, factors in enumerate(k.factors.values()):
        of_a, of_g = rule.split(factors.A, factors.G, 0.2)
        A, G = factors.A + of_a * eye(len(factors.A)), factors.G + of_g * eye(len(factors.G))
        torch.testing.assert_close(hat[i][i], torch.kron(A, G), rtol=1e-8, atol=1e-8)
    assert isinstance(k._chain, LayerChain)


def test_uncovered_parameters_and_partly_frozen_layers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(3, 2), nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)) * self.scale)

    net, x = Scaled().double(), draw(8, 3)
    net.first.bias.requires_grad_(False)
    net.last.weight.requires_grad_(False)
    k = estimate(net, ng.Gaussian(), x, uncovered="diagonal")
    assert k.pairs["first", "last"].A.shape == (3, 1)
    exact = ng.Fisher(net, ng.Gaussian(), x).to_dense()
    torch.testing.assert_close(k.to_dense()[:2, :2], exact[:2, :2].diag().diag())
    dense = torch.linalg.inv(k.inverse(0.1).to_dense())
    torch.testing.assert_close(dense[0, 0], exact[0, 0] + 0.1)
    assert dense[2:, 2:].abs().min() > 0  # weight of first against bias of last: a full cross block
