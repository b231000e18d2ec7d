"""Parameters that no Kronecker factor covers."""

import pytest
from oracles.kfac import data
from torch import nn

import natgrad as ng


def test_uncovered_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match=r"1\.weight"):
        ng.KFAC(model, ng.Gaussian())
    x, y = data(ng.Gaussian(), 4, 2)
    opt = ng.KFAC(model, ng.Gaussian(), uncovered="identity")
    first = ng.Gaussian().nll(model(x), y).item()
    for _ in range(30):
        opt.step(x, y)
    assert ng.Gaussian().nll(model(x), y).item() < 0.2 * first
