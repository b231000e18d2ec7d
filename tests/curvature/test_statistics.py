"""Statistics add up, subsets of rows, weights, and the inverses of single blocks."""

import pytest
import torch
from curvature.oracle import Net
from torch import nn

from natgrad.curvature.base import Diagonal, Factors, LayerSums, Statistics, factors_from, to_dense
from natgrad.curvature.kfac import (
    ExactInverse,
    FactoredInverse,
    collect,
    eigenbasis,
    invert_block,
    statistics_from,
)
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import cover
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian
from natgrad.model_view import ModelView


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setup(model):
    view = ModelView(model)
    return view, Capture(model, cover(view, "identity").layers)


def same(one: Statistics, two: Statistics) -> None:
    assert one.layers.keys() == two.layers.keys() and one.examples == two.examples
    found, expected = factors_from(one), factors_from(two)
    for name in expected:
        torch.testing.assert_close(to_dense(found[name].A), to_dense(expected[name].A))
        torch.testing.assert_close(to_dense(found[name].G), to_dense(expected[name].G))


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)])
@pytest.mark.parametrize("likelihood", [Bernoulli("element"), Categorical()])
@pytest.mark.parametrize("diagonal_output", [True, False])
def test_leading_rows_of_a_longer_pass(shape, likelihood, diagonal_output):
    """The sampled targets of τ₁ m rows reuse the forward pass of more."""
    net, x = Net([3, 4, 2]), draw(*shape)
    view, capture = setup(net)
    with capture.record() as record:
        z = view(x)
    options = {"expectation": "exact", "diagonal_output": diagonal_output}
    same(
        statistics_from(record, z, likelihood, rows=2, **options),
        collect(view, capture, likelihood, x[:2], **options),
    )
    weight = draw(6, seed=4).square()
    same(
        statistics_from(record, z, likelihood, rows=2, weight=weight, **options),
        collect(view, capture, likelihood, x[:2], weight=weight[:2], **options),
    )
    y = torch.ones(z.shape[:-1], dtype=torch.long) if isinstance(likelihood, Categorical) else torch.ones_like(z)
    same(
        statistics_from(record, z, likelihood, rows=2, targets=y, expectation="empirical"),
        collect(view, capture, likelihood, x[:2], y=y[:2], expectation="empirical"),
    )


def test_leading_rows_where_a_layer_sees_examples_and_positions_flattened():
    """Its rows cannot be told apart by example: A is that of all rows, G that of the leading examples."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * 2

    model, x = Flat(), draw(6, 4, 3)
    view, capture = setup(model)
    with capture.record() as record:
        z = view(x)
    found = factors_from(statistics_from(record, z, Bernoulli(), rows=2, expectation="exact"))["fc"]
    whole = factors_from(collect(view, capture, Bernoulli(), x, expectation="exact"))["fc"]
    part = factors_from(collect(view, capture, Bernoulli(), x[:2], expectation="exact"))["fc"]
    torch.testing.assert_close(found.A, whole.A)
    torch.testing.assert_close(found.G, part.G)


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Bernoulli(), Categorical()])
def test_weights_of_examples(likelihood, expectation):
    """An example of weight 3 counts like three examples, but for the normaliser; empirical g's carry it too."""
    net, x, weight = Net([3, 4, 2]), draw(4, 3), torch.tensor([1.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    view, capture = setup(net)
    z = net(x)
    y = torch.ones(4, dtype=torch.long) if isinstance(likelihood, Categorical) else torch.full_like(z, 0.3)
    found = collect(view, capture, likelihood, x, y=y, weight=weight, expectation=expectation)
    power = 1 if expectation == "exact" else 2
    G = torch.zeros(4, 4, dtype=torch.float64)
    for n in range(4):
        one = collect(view, capture, likelihood, x[n : n + 1], y=y[n : n + 1], expectation=expectation)
        G += weight[n] ** power * factors_from(one)["layers.0"].G / 4
    torch.testing.assert_close(factors_from(found)["layers.0"].G, G)


def test_samples_average_and_known_outputs_take_no_draws():
    net, x = Net([3, 2]), draw(5, 3)
    view, capture = setup(net)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    stats = collect(view, capture, Bernoulli(), x, expectation="sampled", generator=generator)
    assert torch.equal(generator.get_state(), state)  # the only G is known
    same(stats, collect(view, capture, Bernoulli(), x, expectation="exact"))
    drawn = collect(
        view, capture, Bernoulli(), x, expectation="sampled", samples=3000, generator=generator, diagonal_output=False
    )
    exact = collect(view, capture, Bernoulli(), x, expectation="exact", diagonal_output=False)
    torch.testing.assert_close(
        factors_from(drawn)["layers.0"].G, factors_from(exact)["layers.0"].G, atol=0.02, rtol=0.05
    )


def test_sampled_draws_are_scores_of_drawn_targets():
    net, x = Net([3, 4, 2]), draw(5, 3)
    view, capture = setup(net)
    stats = collect(view, capture, Categorical(), x, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        y = Categorical().sample(net(x), generator=torch.Generator().manual_seed(7))
    same(stats, collect(view, capture, Categorical(), x, y=y, expectation="empirical"))


def test_additive_and_scaled():
    net, x = Net([3, 4, 2]), draw(6, 3)
    view, capture = setup(net)
    whole = collect(view, capture, Categorical(), x, expectation="exact")
    parts = [collect(view, capture, Categorical(), part, expectation="exact") for part in x.split([1, 2, 3])]
    same(parts[0] + parts[1] + parts[2], whole)
    same(parts[2] + (parts[0] + parts[1]), whole)
    scaled = whole.scaled(0.5)
    assert scaled.examples == 3 and scaled.layers["layers.0"].rows == 3
    for name, f in factors_from(scaled).items():
        torch.testing.assert_close(f.to_dense(), factors_from(whole)[name].to_dense())


def test_a_layer_seen_in_one_part_only():
    one = Statistics({"a": LayerSums(torch.eye(2), torch.eye(2), 1)}, 1.0, 1.0)
    two = Statistics({"b": LayerSums(torch.eye(2), torch.ones(2), 1)}, 1.0, 1.0)
    total = one + two
    assert set(total.layers) == {"a", "b"} and total.examples == 2
    mixed = two + Statistics({"b": LayerSums(torch.eye(2), torch.eye(2), 1)}, 1.0, 1.0)
    torch.testing.assert_close(mixed.layers["b"].G, 2 * torch.eye(2))


def test_state_round_trip():
    net, x = Net([3, 4, 2]), draw(6, 3)
    view, capture = setup(net)
    stats = collect(view, capture, Bernoulli("none"), x, expectation="exact")
    state = stats.state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = Statistics.from_state(state)
    same(again, stats)
    assert again.additive is False and again.count == stats.count
    with pytest.raises(ValueError, match="no example"):
        factors_from(Statistics())


FACTORS = {
    "dense": lambda A, G: Factors(A, G),
    "diagonal G": lambda A, G: Factors(A, Diagonal(G.diagonal())),
    "diagonal A": lambda A, G: Factors(Diagonal(A.diagonal()), G),
    "diagonal": lambda A, G: Factors(Diagonal(A.diagonal()), Diagonal(G.diagonal())),
}


def spd(n, seed):
    x = draw(n, n + 1, seed=seed)
    return x @ x.T / n


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("rule", [ExactTikhonov(), FactoredTikhonov(), FactoredTikhonov("one")])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_block_inverse(kind, rule, as_tensor):
    factors = FACTORS[kind](spd(4, 0), spd(3, 1))
    A, G = to_dense(factors.A), to_dense(factors.G)
    if isinstance(rule, ExactTikhonov):
        damped = torch.kron(A, G) + 0.3 * torch.eye(12, dtype=A.dtype)
    else:
        of_a, of_g = rule.split(A, G, 0.3)
        damped = torch.kron(A + of_a * torch.eye(4, dtype=A.dtype), G + of_g * torch.eye(3, dtype=A.dtype))
    inverse = invert_block(factors, torch.tensor(0.3, dtype=A.dtype) if as_tensor else 0.3, rule)
    assert inverse.ok
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(damped))
    V = draw(3, 4, seed=5)
    before = V.clone()
    found = inverse.apply(V)
    assert torch.equal(V, before)
    torch.testing.assert_close(found.T.reshape(-1), torch.linalg.solve(damped, V.T.reshape(-1)))
    assert inverse.apply(V.float()).dtype == torch.float32  # factors may be wider than parameters


def test_a_new_damping_reuses_the_basis():
    factors = Factors(spd(4, 0), spd(3, 1))
    basis = eigenbasis(factors)
    V = draw(3, 4)
    for damping in (0.1, torch.tensor(2.0)):
        torch.testing.assert_close(
            ExactInverse(basis, damping).apply(V), invert_block(factors, damping, ExactTikhonov()).apply(V)
        )
    torch.testing.assert_close(basis.rotate_back(basis.rotate(V)), V)


@pytest.mark.parametrize("rule", [ExactTikhonov(), FactoredTikhonov()])
@pytest.mark.parametrize("kind", FACTORS)
def test_broken_factors_are_flagged(rule, kind):
    for which in range(2):
        A, G = spd(4, 0), spd(3, 1)
        (A, G)[which][1, 1] = torch.nan
        assert not invert_block(FACTORS[kind](A, G), 0.1, rule).ok
        with pytest.raises(ValueError, match="the block of 'fc'"):
            invert_block(FACTORS[kind](A, G), 0.1, rule, check=True, what="the block of 'fc'")


def test_singular_blocks():
    A, G = spd(4, 0), spd(3, 1)
    A[:, 0] = A[0, :] = 0
    for rule in (ExactTikhonov(), FactoredTikhonov()):
        with pytest.raises(ValueError, match="singular.*for example damping="):
            invert_block(Factors(A, G), 0.0, rule, check=True)
        assert invert_block(Factors(A, G), 1e-6, rule, check=True).ok
    with pytest.raises(TypeError, match="FactoredTikhonov"):
        invert_block(Factors(A, G), 1.0, "exact")


def test_factored_inverse_is_a_value():
    inverse = invert_block(Factors(spd(4, 0), spd(3, 1)), 0.1)
    assert isinstance(inverse, FactoredInverse)
    with pytest.raises(AttributeError):
        inverse.A = inverse.G
