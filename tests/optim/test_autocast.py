"""Optimisers that evaluate the model themselves take the same steps inside and outside of autocast."""

import pytest
import torch
from torch import nn

import natgrad as ng


def trained(kind: str, autocast: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    settings = {"lr": 0.01} if kind == "EigenAdam" else {}
    opt = getattr(ng, kind)(model, ng.Bernoulli(), **settings)
    x, y = torch.randn(16, 6), torch.rand(16, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(3):
            opt.step(x, y)
        assert torch.is_autocast_enabled("cpu") == autocast
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["KFAC", "EigenAdam", "NaturalGradient", "HessianFree", "KrylovDescent", "TONGA"])
def test_the_same_steps_inside_autocast(kind: str) -> None:
    assert torch.equal(trained(kind, True), trained(kind, False))
