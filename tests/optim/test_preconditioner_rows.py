"""Statistics from a share of a batch's examples, which stand for the whole batch."""

import math
from typing import Any

import pytest
import torch
from optim.test_layer_kinds import small
from oracles.layers import draw
from oracles.preconditioning import EVERY_STEP, exact, mlp
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import to_dense

HALF, QUARTER = (ng.Renewal(1, (), 1, rows=share) for share in (0.5, 0.25))


class Flattened(nn.Module):
    """A layer that sees examples and positions in one dimension: its rows cannot be told apart by example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(0, 1)))
        return self.second(h).unflatten(0, x.shape[:2]).mean(1)


def observe(pre: ng.Preconditioner, model: nn.Module, likelihood: Any, x: Any, y: Any, how: str) -> None:
    model.zero_grad()
    z = model(x)
    if how == "update":
        pre.update(x, y)
    else:
        pre.observe(z, y)
    likelihood.nll(z, y).backward()
    pre.step()


def assert_factors(pre: ng.Preconditioner, expected: Any, scale: float = 1.0) -> None:
    for name, factors in expected.items():
        found = pre._running.factors[name]
        torch.testing.assert_close(to_dense(found.A), to_dense(factors.A), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(to_dense(found.G), to_dense(factors.G) * scale, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["observe", "update"])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("normalizer", ["example", "element", "none"])
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_factors_are_those_of_the_first_examples(name: str, normalizer: str, expectation: str, how: str) -> None:
    model, x, y = small(name)
    model.eval()  # with batch statistics the first examples would depend on the others
    likelihood, rows = ng.Categorical(normalizer), math.ceil(len(x) / 2)
    assert 1 < rows < len(x)
    pre = exact(model, likelihood, expectation=expectation, periods=HALF)
    observe(pre, model, likelihood, x, y, how)
    given = {"expectation": expectation, "y": y[:rows] if expectation == "empirical" else None}
    expected = ng.kronecker_fisher(model, likelihood, x[:rows], **given)
    # A plain sum over the batch is so many times that over its share.
    scale = len(x) / rows if normalizer == "none" and expectation == "exact" else 1.0
    bare = {n for n, factors in expected.factors.items() if to_dense(factors.G).shape[-1] == 1}
    assert_factors(pre, {n: f for n, f in expected.factors.items() if n not in bare}, scale)
    for n in bare:
        found, block = pre._running.factors[n], expected.factors[n]
        assert torch.allclose(found.to_dense(), block.to_dense() * scale, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "input_covariance"])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_structures_and_micro_batches(structure: str, expectation: str) -> None:
    """Micro-batches count by their own sizes, not by those of their shares."""
    model, likelihood = mlp(3, 5, 2), ng.Bernoulli("none")
    sizes = [8, 4]
    xs, ys = [draw(n, 3, seed=n) for n in sizes], [torch.rand(n, 2, dtype=torch.float64) for n in sizes]
    pre = exact(model, likelihood, structure=structure, expectation=expectation, periods=QUARTER, damping=0.5)
    for x, y in zip(xs, ys, strict=True):
        z = model(x)
        pre.observe(z, y)
        likelihood.nll(z, y).backward()
    pre.step()
    parts = []
    for x, y in zip(xs, ys, strict=True):
        given = {"expectation": expectation, "y": y[: len(x) // 4] if expectation == "empirical" else None}
        parts.append(ng.kronecker_fisher(model, likelihood, x[: len(x) // 4], **given))
    for name in parts[0].factors:
        A = sum(n / 12 * to_dense(k.factors[name].A) for n, k in zip(sizes, parts, strict=True))
        torch.testing.assert_close(to_dense(pre._running.factors[name].A), A, rtol=1e-9, atol=1e-12)
        if structure == "input_covariance":
            continue
        # Of the sum over a share of n/4 examples the mean over them is a 4/n-th; of the sum over all 12 it is 1/12.
        unit = {"exact": lambda n: 4 / n, "empirical": lambda n: 1.0}[expectation]
        G = sum(n / 12 * unit(n) * to_dense(k.factors[name].G) for n, k in zip(sizes, parts, strict=True))
        total = G * (12 if expectation == "exact" else 1)
        torch.testing.assert_close(to_dense(pre._running.factors[name].G), total, rtol=1e-9, atol=1e-12)


def test_second_moments_of_ekfac() -> None:
    model, likelihood, x = mlp(3, 5, 2), ng.Bernoulli(), draw(12, 3)
    y = torch.rand(12, 2, dtype=torch.float64)
    pre = exact(model, likelihood, structure="ekfac", expectation="empirical", periods=QUARTER, decay=0.0)
    observe(pre, model, likelihood, x, y, "observe")
    bases = dict(pre._inverses.bases)
    observe(pre, model, likelihood, x, y, "observe")
    for name, basis in bases.items():
        layer = model.get_submodule(name)
        S = 0.0
        for n in range(3):
            nll = likelihood.nll(model(x[n : n + 1]), y[n : n + 1])
            dW, db = torch.autograd.grad(nll, [layer.weight, layer.bias])
            S = S + basis.rotate(torch.cat([dW, db[:, None]], dim=1)).square() / 3
        # The second step's moments went in before the basis was renewed, with the weight of everything (decay 0).
        overlaps = [
            new.T @ old
            for new, old in ((getattr(pre._inverses.bases[name], q), getattr(basis, q)) for q in ("QG", "QA"))
        ]
        expected = overlaps[0].square() @ S @ overlaps[1].square().T
        torch.testing.assert_close(pre._inverses.scalings[name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_rows_that_cannot_be_told_apart_count_for_their_share(expectation: str) -> None:
    """A of all rows, and a G that is unbiased: with examples that are all alike it is that of the whole batch."""
    model, likelihood = Flattened().double(), ng.Gaussian()
    x = draw(1, 5, 3).expand(8, 5, 3)
    y = torch.rand(1, 2, dtype=torch.float64).expand(8, 2)
    whole = exact(model, likelihood, expectation=expectation, periods=EVERY_STEP)
    share = exact(model, likelihood, expectation=expectation, periods=QUARTER)
    for pre in (whole, share):
        observe(pre, model, likelihood, x, y, "observe")
    assert_factors(share, whole._running.factors)


def test_shares_that_are_none() -> None:
    for wrong in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="rows"):
            ng.Renewal(rows=wrong)
    assert "rows=0.25" in repr(QUARTER)
