"""Inverses that are renewed at every step: solves with Cholesky factors in the place of products with inverses."""

import copy

import pytest
import torch
from oracles.layers import draw
from oracles.preconditioning import batch, gradient, targets, train_once
from torch import nn

import natgrad as ng
from natgrad.curvature.base import Diagonal, Factors
from natgrad.curvature.block_inverse import FactoredInverse, SolvedInverse
from natgrad.curvature.inverse import invert_block
from natgrad.damping import FactoredTikhonov
from natgrad.optim.inverses import LayerInverses
from natgrad.optim.single_use import SingleUseInverses

EVERY_STEP = ng.Renewal(1, (), 1)


def moment(n: int, seed: int) -> torch.Tensor:
    X = draw(n, 2 * n, seed=seed)
    return X @ X.T / n


@pytest.mark.parametrize(("out", "columns"), [(3, 5), (5, 5), (5, 3)])
@pytest.mark.parametrize("pi", ["trace", "frobenius"])
def test_solves_are_products_with_the_inverse(out: int, columns: int, pi: str) -> None:
    """Of a block with more rows than columns the inverse is written out, of one with a diagonal factor too."""
    form = FactoredTikhonov(pi=pi)
    inverses, factors = SingleUseInverses(form), Factors(moment(columns, 0), moment(out, 1))
    diagonal = Factors(moment(columns, 0), Diagonal(draw(out, seed=2).square()))
    inverses.refresh({"": factors, "diagonal": diagonal}, 0.3)
    found, V = inverses.get("", 0.3), draw(out, columns, seed=3)
    assert isinstance(found, SolvedInverse if out <= columns else FactoredInverse)
    assert isinstance(inverses.get("diagonal", 0.3), FactoredInverse)
    expected = invert_block(factors, 0.3, form)
    torch.testing.assert_close(found.apply(V), expected.apply(V))
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    torch.testing.assert_close(found.apply(V).T.flatten(), found.to_dense() @ V.T.flatten())


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 3), nn.Tanh(), nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def test_steps_are_those_with_written_inverses() -> None:
    likelihood, net = ng.Categorical(), model()
    twin = copy.deepcopy(net)
    pres = [ng.Preconditioner(m, likelihood, periods=EVERY_STEP) for m in (net, twin)]
    assert type(pres[0]._inverses) is SingleUseInverses
    pres[1]._inverses = LayerInverses(pres[1]._inverses.form)
    for k in range(3):
        both = zip((net, twin), pres, strict=True)
        found = [train_once(m, pre, likelihood, batch(seed=k), targets(likelihood)) for m, pre in both]
        torch.testing.assert_close(*found)
    kinds = [type(pres[0]._inverses.get(name, 1.0)) for name in ("0", "3", "5")]
    assert kinds == [SolvedInverse, FactoredInverse, SolvedInverse]


@pytest.mark.parametrize(
    "settings",
    [{"periods": ng.Renewal(2)}, {"structure": "ekfac"}, {"form": FactoredTikhonov(solver=ng.linalg.LowRank(2))}],
)
def test_other_settings_have_inverses_of_their_own(settings: dict) -> None:
    pre = ng.Preconditioner(model(), ng.Categorical(), **{"periods": EVERY_STEP, **settings})
    assert not isinstance(pre._inverses, SingleUseInverses)


def test_resuming_equals_an_uninterrupted_run_and_a_bad_estimate_changes_nothing() -> None:
    likelihood, net = ng.Categorical(), model()
    pre = ng.Preconditioner(net, likelihood, periods=EVERY_STEP)
    y = targets(likelihood)
    for k in range(2):
        train_once(net, pre, likelihood, batch(seed=k), y)
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = ng.Preconditioner(other, likelihood, periods=EVERY_STEP, seed=5)
    resumed.load_state_dict(copy.deepcopy(pre.state_dict()))
    for k in range(2, 5):
        x = batch(seed=k)
        for own, mine in ((net, pre), (other, resumed)):
            own.zero_grad()
            z = own(x)
            mine.observe(z * torch.nan if k == 2 else z)  # an estimate that is left out
            likelihood.nll(z, y).backward()
            mine.step()
        assert torch.equal(gradient(net), gradient(other))
    assert pre.stats["skipped"] == 1 and pre.stats["failed_inverses"] == 0 and pre.stats["bare"] == 0


def test_a_factor_that_single_precision_cannot_decompose_is_tried_in_double() -> None:
    A = torch.ones(2, 2)
    inverses = SingleUseInverses(FactoredTikhonov(pi="one"))
    inverses.refresh({"": Factors(A, torch.eye(2))}, 1e-18)
    found = inverses.get("", 1e-18)
    assert isinstance(found, SolvedInverse) and found.L.dtype == torch.float64 and inverses.failures == 0
    assert found.apply(torch.eye(2)).dtype == torch.float32
    inverses.refresh({"": Factors(A * torch.nan, torch.eye(2))}, 1e-18)
    assert inverses.get("", 1e-18) is found and inverses.failures == 1
