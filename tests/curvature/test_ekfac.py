"""`structure="ekfac"`: second moments in the eigenbasis against dense twins, and what that buys."""

import pytest
import torch
from curvature import oracle
from curvature.oracle import Net
from curvature.test_against_autodiff import CASES as LOSSES
from curvature.test_against_autodiff import problem as loss_problem
from curvature.test_kronecker_fisher import LIKELIHOODS, NETS, draw, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from natgrad.curvature import ekfac, kronecker_fisher
from natgrad.curvature.base import Factors, LayerSums, Statistics, factors_from
from natgrad.curvature.inverse import eigenbasis, kronecker_basis
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian


@pytest.fixture(params=NETS)
def net_and_data(request):
    net, shape = NETS[request.param]()
    return net, draw(*shape)


def basis_of(k) -> Tensor:
    """Q of all layers, in the "vec" order."""
    return torch.block_diag(*(kronecker_basis(basis) for basis in k.bases.values()))


def layer_blocks(dense: Tensor, net: Net) -> Tensor:
    """The diagonal blocks of layers alone."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in net.layers]
    mask = torch.block_diag(*(torch.ones(n, n, dtype=dense.dtype) for n in sizes))
    return dense * mask


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_diagonal_in_the_eigenbasis_and_its_inverse(net_and_data, name, expectation) -> None:
    net, x = net_and_data
    likelihood = LIKELIHOODS[name]("example")
    y = targets(likelihood, net(x)) if expectation == "empirical" else None
    F = oracle.exact_block(net, likelihood, x, y)
    k = kronecker_fisher(net, likelihood, x, structure="ekfac", expectation=expectation, y=y)
    Q = basis_of(k)
    torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q), dtype=Q.dtype))
    kron = kronecker_fisher(net, likelihood, x, structure="block_diagonal", expectation=expectation, y=y)
    rotated = Q.T @ kron.to_dense(order="vec") @ Q
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()))  # Q diagonalises A ⊗ G
    twin = Q @ torch.diag((Q.T @ F @ Q).diagonal()) @ Q.T
    dense = k.to_dense(order="vec")
    torch.testing.assert_close(dense, twin)
    torch.testing.assert_close(dense.trace(), F.trace())
    eye = torch.eye(len(F), dtype=F.dtype)
    inverse = k.inverse(damping=0.1)
    torch.testing.assert_close(inverse.to_dense(order="vec"), torch.linalg.inv(twin + 0.1 * eye))
    v = draw(len(F), 2, seed=3)
    torch.testing.assert_close(k @ v, k.to_dense() @ v)
    torch.testing.assert_close(inverse @ v, inverse.to_dense() @ v)
    torch.testing.assert_close(inverse @ v[:, 0], inverse.to_dense() @ v[:, 0])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_nearer_to_the_fisher_than_the_kronecker_product(net_and_data, name) -> None:
    net, x = net_and_data
    likelihood = LIKELIHOODS[name]("example")
    F = oracle.exact_block(net, likelihood, x)
    errors = {
        structure: (kronecker_fisher(net, likelihood, x, structure=structure).to_dense(order="vec") - F).norm()
        for structure in ("ekfac", "block_diagonal")
    }
    assert errors["ekfac"] <= errors["block_diagonal"] * (1 + 1e-9) + 1e-12 * F.norm()
    if len(x) > 1 and len(net.layers) > 1:  # otherwise both may be exact
        assert errors["ekfac"] < 0.99 * errors["block_diagonal"]


@pytest.mark.parametrize("case", LOSSES)
def test_weights_masks_and_likelihoods_of_ones_own(case) -> None:
    """diag(Qᵀ F Q) with the block that automatic differentiation gives (through exact_block, tested elsewhere)."""
    model, likelihood, x, y = loss_problem(case)
    options = {"expectation": "exact", "y": y, "weight": torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)}
    k = kronecker_fisher(model, likelihood, x, structure="ekfac", **options)
    F = kronecker_fisher(model, likelihood, x, structure="exact_block", **options).to_dense(order="vec")
    Q = basis_of(k)
    twin = Q @ torch.diag((Q.T @ F @ Q).diagonal()) @ Q.T
    torch.testing.assert_close(k.to_dense(order="vec"), twin)


@pytest.mark.parametrize("normalizer", ["element", "none"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_scale_is_that_of_the_loss(name, normalizer) -> None:
    net, x = Net([2, 3, 2]), draw(4, 3, 2)
    likelihood = LIKELIHOODS[name](normalizer)
    F = oracle.exact_block(net, likelihood, x)
    k = kronecker_fisher(net, likelihood, x, structure="ekfac")
    torch.testing.assert_close(k.to_dense().trace(), F.trace())
    split = kronecker_fisher(net, likelihood, list(x.split([1, 3])), structure="ekfac")
    torch.testing.assert_close(split.to_dense(), k.to_dense())


@pytest.mark.parametrize("split", [[8], [3, 5], [1] * 8])
def test_the_draws_of_both_passes_are_the_same(split) -> None:
    """One draw per example, made once: S is the diagonal of Qᵀ F Q for the F of those very draws."""
    net, x = Net([3, 4, 2]), draw(8, 3)
    options = {"expectation": "sampled", "samples": 2}
    batches = list(x.split(split))
    found = {
        s: kronecker_fisher(
            net, Categorical(), batches, structure=s, generator=torch.Generator().manual_seed(3), **options
        )
        for s in ("ekfac", "exact_block", "block_diagonal")
    }
    F, Q = found["exact_block"].to_dense(order="vec"), basis_of(found["ekfac"])
    twin = Q @ torch.diag((Q.T @ F @ Q).diagonal()) @ Q.T
    torch.testing.assert_close(found["ekfac"].to_dense(order="vec"), twin)
    for name, factors in found["block_diagonal"].factors.items():
        torch.testing.assert_close(found["ekfac"].factors[name].G.to_dense(), factors.G.to_dense())


def test_random_streams() -> None:
    net, x = Net([3, 2, 2]), draw(5, 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    kronecker_fisher(net, Categorical(), x, structure="ekfac", expectation="sampled")
    assert torch.equal(torch.get_rng_state(), before)


def test_kronecker_special_case() -> None:
    """Where inputs and output derivatives are independent, S = g aᵀ: one linear layer with Gaussian noise."""
    net, x = Net([3, 2]), draw(6, 3)
    k = kronecker_fisher(net, Gaussian(0.5), x, structure="ekfac")
    basis = k.bases["layers.0"]
    torch.testing.assert_close(k.factors["layers.0"].S, torch.outer(basis.g, basis.a))
    kron = kronecker_fisher(net, Gaussian(0.5), x, structure="block_diagonal")
    torch.testing.assert_close(k.to_dense(), kron.to_dense())
    torch.testing.assert_close(k.inverse(0.3).to_dense(), kron.inverse(0.3, kind="exact").to_dense())


class Twice(nn.Module):
    """One layer used twice per example, with frozen bias, between two others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = (nn.Linear(*d).double() for d in ((2, 3), (3, 3), (3, 2)))
        self.shared.bias.requires_grad_(False)
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def test_layer_used_twice_and_frozen_parts() -> None:
    model, x = Twice(), draw(5, 2)
    k = kronecker_fisher(model, Categorical(), x, structure="ekfac")
    F = kronecker_fisher(model, Categorical(), x, structure="exact_block").to_dense(order="vec")
    Q = basis_of(k)
    torch.testing.assert_close(k.to_dense(order="vec"), Q @ torch.diag((Q.T @ F @ Q).diagonal()) @ Q.T)
    assert k.bases["shared"].a.shape == (3,) and k.bases["last"].a.shape == (1,)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))
def test_squares_in_chunks(batch, uses, out, columns, limit) -> None:
    a, g = draw(batch, uses, columns), draw(batch, uses, out, seed=1)
    twin = sum((g[n].T @ a[n]) ** 2 for n in range(batch))
    total = torch.zeros(out, columns, dtype=torch.float64)
    old, ekfac._ELEMENTS_AT_ONCE = ekfac._ELEMENTS_AT_ONCE, limit
    try:
        ekfac.add_gradient_squares(total, a, g)
    finally:
        ekfac._ELEMENTS_AT_ONCE = old
    torch.testing.assert_close(total, twin)


def test_carried_over_to_another_basis() -> None:
    """The diagonal of the old approximation in the new basis; with the same basis nothing changes."""

    def spd(n: int, seed: int) -> Tensor:
        m = draw(n, n, seed=seed)
        return m @ m.T

    old, new = eigenbasis(Factors(spd(3, 0), spd(2, 1))), eigenbasis(Factors(spd(3, 2), spd(2, 3)))
    S = draw(2, 3, seed=4).exp()
    Q, R = kronecker_basis(old), kronecker_basis(new)
    twin = (R.T @ Q @ torch.diag(S.T.reshape(-1)) @ Q.T @ R).diagonal().reshape(3, 2).T
    torch.testing.assert_close(ekfac.carried_over(S, old, new), twin)
    torch.testing.assert_close(ekfac.carried_over(S, old, old), S)
    torch.testing.assert_close(ekfac.carried_over(S, old, new).sum(), S.sum())


@pytest.mark.parametrize("known", ["old", "new", "both"])
def test_carried_over_with_a_diagonal_factor(known) -> None:
    from natgrad.curvature.base import Diagonal

    m = draw(3, 3)
    full, diagonal = Factors(torch.eye(2, dtype=m.dtype), m @ m.T), Factors(torch.eye(2, dtype=m.dtype), Diagonal(m[0]))
    old = eigenbasis(diagonal if known in ("old", "both") else full)
    new = eigenbasis(diagonal if known in ("new", "both") else full)
    S = draw(3, 2, seed=4).exp()
    Q, R = kronecker_basis(old), kronecker_basis(new)
    twin = (R.T @ Q @ torch.diag(S.T.reshape(-1)) @ Q.T @ R).diagonal().reshape(2, 3).T
    torch.testing.assert_close(ekfac.carried_over(S, old, new), twin)


def test_statistics_keep_their_squares() -> None:
    sums = LayerSums(torch.eye(2), torch.eye(3), 4.0, squares=torch.arange(6.0).reshape(3, 2))
    one = Statistics({"a": sums}, 4.0, 2.0)
    both = one + one.scaled(3.0)
    torch.testing.assert_close(factors_from(both)["a"].S, sums.squares / 2)
    again = Statistics.from_state(both.state())
    torch.testing.assert_close(factors_from(again)["a"].S, sums.squares / 2)
    bare = Statistics({"a": LayerSums(torch.eye(2), torch.eye(3), 4.0)}, 4.0, 2.0)
    assert factors_from(one + bare)["a"].S is None


class PositionsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Flattened(PositionsFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_positions_first() -> None:
    """The same matrix as with the examples first."""
    model, x = PositionsFirst(), draw(4, 3, 2)
    first = kronecker_fisher(model, Bernoulli(), x, structure="ekfac")
    twin = kronecker_fisher(model.layer, Bernoulli(), x, structure="ekfac")
    torch.testing.assert_close(first.to_dense(), twin.to_dense())


def test_what_is_refused() -> None:
    net, x = Net([3, 2, 2]), draw(8, 3)
    with pytest.raises(ValueError, match="layer 'layer' .*structure='block_diagonal'"):
        kronecker_fisher(Flattened(), Gaussian(), draw(4, 3, 2), structure="ekfac")
    x[:, 1] = 0  # a dead input
    k = kronecker_fisher(net, Bernoulli(), x, structure="ekfac")
    with pytest.raises(ValueError, match="kind='factored' is for structure 'block_diagonal'"):
        k.inverse(0.1, kind="factored")
    with pytest.raises(ValueError, match="layer 'layers.0' is singular.*damping") as error:
        k.inverse()
    k.inverse(float(str(error.value).replace("damping=", " ").split()[-1]))
    with pytest.raises(ValueError, match="damping=-1"):
        k.inverse(-1.0)
