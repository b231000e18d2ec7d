"""Sums of outer products kept as rows: the same numbers as the matrices, wherever they go."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import natgrad as ng
from natgrad.curvature.base import Diagonal, Factors, LayerSums, Statistics, entries, factors_from, to_dense
from natgrad.curvature.gram import Gram
from natgrad.curvature.kfac import statistics_from
from natgrad.curvature.running import RunningFactors
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import cover
from natgrad.model_view import ModelView

YES = torch.ones((), dtype=torch.bool)


def bar(x, bias):
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if bias else x


@settings(derandomize=True, deadline=None, max_examples=20)
@given(rows=st.integers(0, 7), d=st.integers(1, 5), bias=st.booleans(), weight=st.floats(0.01, 1))
def test_an_average_takes_the_rows_in_as_it_would_the_matrix(rows, d, bias, weight):
    x = torch.randn(rows, d, dtype=torch.float64)
    gram = Gram(x, bias) * 0.3
    matrix = 0.3 * bar(x, bias).T @ bar(x, bias)
    old = torch.randn(d + bias, d + bias, dtype=torch.float64)
    average = old + old.T
    expected = (1 - weight) * average + weight * matrix
    gram.average_into(average, torch.tensor(weight, dtype=torch.float64), YES)
    torch.testing.assert_close(average, expected)
    torch.testing.assert_close(gram.to_dense(), matrix)
    torch.testing.assert_close(gram.trace(), matrix.trace())
    assert gram.shape == matrix.shape


def test_sums_stay_rows_as_long_as_these_are_few():
    x, y, z = (torch.randn(n, 5, dtype=torch.float64) for n in (2, 3, 1))
    both = Gram(x) + Gram(y)
    assert isinstance(both, Gram) and len(both.rows) == 5
    torch.testing.assert_close(to_dense(both), x.T @ x + y.T @ y)
    all_three = both + Gram(z)
    assert isinstance(all_three, torch.Tensor)
    torch.testing.assert_close(all_three, x.T @ x + y.T @ y + z.T @ z)


def test_rows_of_different_scales_are_not_put_together():
    x, y = (torch.randn(n, 5, dtype=torch.float64) for n in (2, 1))
    for scale in (0.5, torch.tensor(0.5)):
        torch.testing.assert_close(to_dense(Gram(x) * scale + Gram(y)), 0.5 * x.T @ x + y.T @ y)


def chain(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8, bias=bias), nn.Tanh(), nn.Linear(8, 7)).double()


def statistics(model, x, keep_rows, likelihood, rows=5):
    view = ModelView(model, None)
    capture = Capture(model, cover(view, "error", "block_diagonal", "expand").blocks)
    with torch.enable_grad(), capture.record() as record:
        z = view(x)
    generator = torch.Generator().manual_seed(3)
    return statistics_from(record, z, likelihood, rows=rows, generator=generator, keep_rows=keep_rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("likelihood", [ng.Bernoulli(), ng.Categorical(), ng.Gaussian(normalizer="element")])
def test_statistics_kept_as_rows_give_the_same_factors(likelihood, bias):
    model, x = chain(bias), torch.randn(6, 9, dtype=torch.float64)
    kept, written = (factors_from(statistics(model, x, k, likelihood)) for k in (True, False))
    assert isinstance(kept["0"].A, Gram) and isinstance(kept["0"].G, Gram)
    for name in written:
        torch.testing.assert_close(to_dense(kept[name].A), to_dense(written[name].A))
        torch.testing.assert_close(to_dense(kept[name].G), to_dense(written[name].G))


def test_rows_that_are_more_than_columns_are_multiplied_out():
    sums = statistics(chain(), torch.randn(20, 9, dtype=torch.float64), True, ng.Bernoulli(), rows=20)
    assert all(isinstance(s.A, torch.Tensor) and isinstance(s.G, torch.Tensor) for s in sums.layers.values())


def test_micro_batches_add_up():
    model, x = chain(), torch.randn(4, 9, dtype=torch.float64)
    parts = [statistics(model, part, True, ng.Gaussian(), rows=2) for part in (x[:2], x[2:])]
    whole = factors_from(parts[0] + parts[1])
    a = bar(x, True)
    torch.testing.assert_close(to_dense(whole["0"].A), a.T @ a / 4)
    assert isinstance(whole["0"].A, Gram)


def test_running_averages_are_those_of_matrices():
    model = chain()
    kept, written = RunningFactors(0.9), RunningFactors(0.9)
    for k in range(4):
        x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        kept.update(factors_from(statistics(model, x, True, ng.Bernoulli())), YES)
        written.update(factors_from(statistics(model, x, False, ng.Bernoulli())), YES)
    for name, block in written.factors.items():
        for mine, theirs in ((kept.factors[name].A, block.A), (kept.factors[name].G, block.G)):
            assert isinstance(mine, Diagonal) == isinstance(theirs, Diagonal)
            torch.testing.assert_close(entries(mine), entries(theirs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_rows_that_are_not_finite_leave_the_averages_alone(bad):
    x = torch.randn(2, 4, dtype=torch.float64)
    good = {"layer": Factors(Gram(x, True), Gram(x))}
    averages = RunningFactors()
    assert averages.update(good, YES)
    before = copy.deepcopy(averages.factors)
    x = x.clone()
    x[1, 2] = bad
    assert not averages.update({"layer": Factors(Gram(x, True), Gram(x))}, YES)
    assert not averages.update(good, ~YES)
    assert torch.equal(entries(averages.factors["layer"].A), entries(before["layer"].A))
    assert torch.equal(entries(averages.factors["layer"].G), entries(before["layer"].G))


def test_the_state_of_statistics_holds_matrices():
    x = torch.randn(2, 4, dtype=torch.float64)
    sums = Statistics({"layer": LayerSums(Gram(x, True), Gram(x), 2.0)}, 2.0, 2.0)
    again = Statistics.from_state(sums.state())
    torch.testing.assert_close(again.layers["layer"].A, bar(x, True).T @ bar(x, True))
    torch.testing.assert_close(again.layers["layer"].G, x.T @ x)


def test_training_is_the_same_with_rows_kept(monkeypatch):
    """An update of K-FAC from matrices and from rows, on a chain whose layers are wider than the subset."""
    import natgrad.optim.evaluation as evaluation

    x = torch.rand(32, 9, dtype=torch.float64)
    found = []
    for keep in (True, False):
        with monkeypatch.context() as patch:
            if not keep:
                patch.setattr(
                    evaluation, "statistics_from", lambda *a, **k: statistics_from(*a, **{**k, "keep_rows": False})
                )
            model = chain()
            opt = ng.KFAC(model, ng.Bernoulli(), seed=1, subsets=ng.optim.settings.Subsets(1 / 8, 1 / 8))
            for _ in range(4):
                opt.step(x, x[:, :7])
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
