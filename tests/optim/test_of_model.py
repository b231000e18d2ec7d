"""Optimisers that evaluate their model have its parameters in one group, and are not copied."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad.optim.backprop_update import UpdatedBackprop

OPTIMISERS: dict[str, Callable[[nn.Module, ng.Likelihood], Any]] = {
    "KFAC": ng.KFAC,
    "ACP": lambda model, likelihood: ng.ACP(model, likelihood, lr=0.1),
    "CenteredSGD": lambda model, likelihood: ng.CenteredSGD(model, likelihood, lr=0.1),
    "Newton": lambda model, likelihood: ng.Newton(model, likelihood, damping=1.0),
    "UpdatedBackprop": lambda model, likelihood: UpdatedBackprop(model, likelihood, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_group_and_no_copies(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    optimiser = OPTIMISERS[name](model, ng.Gaussian())
    first = optimiser.step(x, y)
    with pytest.raises(ValueError, match=f"add_param_group: {name} trains the parameters that its model had"):
        optimiser.add_param_group({"params": [("head", nn.Parameter(torch.zeros(3)))]})
    with pytest.raises(TypeError, match=f"{name} belongs to the model that it evaluates and cannot be copied"):
        copy.deepcopy(optimiser)
    assert len(optimiser.param_groups) == 1
    optimiser.step(x, y)
    assert ng.Gaussian().nll(model(x), y) < first
