"""Glorot's and He's initialisation: variances, distributions, repeatability."""

import math

import pytest
import torch
from torch import nn

from natgrad.training import glorot_init_, he_init_


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 200, bias=False)).to(dtype)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_variances(distribution: str, alpha: float) -> None:
    for init, fans in ((glorot_init_, (400, 300)), (he_init_, (300, 100))):
        made = init(model(), alpha, distribution, 0.25, torch.Generator().manual_seed(0))
        assert isinstance(made, nn.Sequential)
        for layer, fan in zip((made[0], made[2]), fans, strict=True):
            weight = layer.weight.detach()
            assert float(weight.var()) == pytest.approx(alpha / fan, rel=0.03)
            assert abs(float(weight.mean())) < 4 * math.sqrt(alpha / fan / weight.numel())
            largest = float(weight.abs().max()) / math.sqrt(alpha / fan)
            assert (largest < math.sqrt(3) + 1e-5) == (distribution == "uniform")
        assert torch.equal(made[0].bias, torch.full((100,), 0.25))


def test_a_seed_gives_the_same_numbers_in_every_dtype_and_the_global_stream_stays() -> None:
    state = torch.get_rng_state()
    nets = [glorot_init_(model(d), generator=torch.Generator().manual_seed(1)) for d in (torch.float32, torch.float64)]
    torch.set_rng_state(state)
    weights = [next(net.parameters()) for net in nets]
    assert torch.equal(weights[0], weights[1].float())
    before = torch.get_rng_state()
    he_init_(nets[0], generator=torch.Generator().manual_seed(2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": -1.0}, "alpha is -1.0"), ({"distribution": "cauchy"}, "distribution is 'cauchy'")],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        he_init_(model(), **arguments)
    with pytest.raises(ValueError, match=r"Tanh has no nn\.Linear"):
        glorot_init_(nn.Tanh())
