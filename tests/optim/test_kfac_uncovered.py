"""Parameters that no Kronecker factor covers: named, treated as identity, or given the diagonal of F."""

from typing import Any

import pytest
import torch
from oracles.kfac import EVERY_ROW, FIXED, NO_UPDATE, data, dense_proposal, dense_update, gradient_of, vector
from torch import nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.optim.settings import Damping

LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


class Norm(nn.LayerNorm):
    """A kind without a rule: its forward is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def normed(seed: int = 0) -> nn.Sequential:
    """Two covered layers around one that is not."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), Norm(3), nn.Tanh(), nn.Linear(3, 2)).double()
    nn.init.normal_(model[1].weight)
    return model


def test_uncovered_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"1\.weight.*1\.bias") as error:
        ng.KFAC(normed(), ng.Gaussian())
    assert "identity" in str(error.value) and "diagonal" in str(error.value)  # what to try
    with pytest.raises(ValueError, match="uncovered='all'"):
        ng.KFAC(normed(), ng.Gaussian(), uncovered="all")
    assert "1.weight" in str(ng.KFAC(normed(), ng.Gaussian(), uncovered="identity").coverage())


@pytest.mark.parametrize("uncovered", ["identity", "diagonal"])
@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
def test_updates_equal_the_dense_reconstruction(likelihood: Any, form: Any, uncovered: str) -> None:
    """The block of an uncovered parameter is ``I + γ² I`` or ``diag(F) + γ² I``; (α, μ) come from all of F."""
    model, lam, l2 = normed(), 0.3, 0.05
    x, y = data(likelihood, 4, 2)
    damping = Damping(lam, form, rule=None, ratio=1.5)
    opt = ng.KFAC(model, likelihood, damping=damping, l2=l2, uncovered=uncovered, **FIXED)
    previous = torch.zeros_like(vector(model))
    for _ in range(3):
        before, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        opt.step(x, y)
        diagonal = {}
        for name in ("1.weight", "1.bias") if uncovered == "diagonal" else ():
            diagonal[name] = opt._running.factors[name].to_dense().diagonal().view(3)
        proposal = dense_proposal(opt, model, gradient, 2.25 * (lam + l2), diagonal=diagonal)
        delta = vector(model) - before
        expected = dense_update(F, lam + l2, gradient, proposal, previous)
        torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)
        previous = delta


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
def test_the_estimated_diagonal_is_that_of_the_fisher_matrix(likelihood: Any) -> None:
    model = normed()
    x, y = data(likelihood, 4, 2, n=8)
    settings = {"subsets": EVERY_ROW, "guard": NO_UPDATE, "decay": 0.9999}
    opt = ng.KFAC(model, likelihood, damping=0.3, uncovered="diagonal", **settings)
    for _ in range(150):
        opt.step(x, y)
    F = ng.Fisher(model, likelihood, x).to_dense()
    exact = dict(zip(("1.weight", "1.bias"), F.diagonal()[15:21].split(3), strict=True))
    for name, expected in exact.items():
        found = opt._running.factors[name].to_dense().diagonal()
        torch.testing.assert_close(found, expected, rtol=0.15, atol=0.01 * expected.max().item())


@pytest.mark.parametrize("uncovered", ["identity", "diagonal"])
def test_all_parameters_are_trained(uncovered: str) -> None:
    model = normed()
    x, y = data(ng.Gaussian(), 4, 2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = ng.KFAC(model, ng.Gaussian(), uncovered=uncovered)
    first = opt.step(x, y).item()
    for _ in range(29):
        opt.step(x, y)
    assert ng.Gaussian().nll(model(x), y).item() < 0.2 * first
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())
