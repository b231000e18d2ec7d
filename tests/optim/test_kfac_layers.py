"""KFAC on layers of all kinds: the proposal against dense blocks, the gradient against differentiation, training."""

from typing import Any

import pytest
import torch
from optim.test_layer_kinds import small
from oracles.layers import draw
from torch import nn

import natgrad as ng
from natgrad.curvature.inverse import invert_block
from natgrad.operators.kronecker import layer_index
from natgrad.optim.settings import Damping, Rescaling, Subsets


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("form", [ng.FactoredTikhonov(), ng.ExactTikhonov()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_the_first_update_is_along_the_dense_proposal(name: str, form: Any, sharing: str) -> None:
    """δ = −α F̆_γ^{-1} ∇h, with α from the exact F."""
    likelihood, lam = ng.Categorical("element"), 0.3
    model, x, y = small(name)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(likelihood.nll(model(x), y), list(model.parameters())))
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt = ng.KFAC(
        model,
        likelihood,
        damping=Damping(lam, form, rule=None),
        subsets=Subsets(1, 1),
        guard=None,
        rescaling=Rescaling(layers=False),
        sharing=sharing,
    )
    opt.step(x, y)
    direction = torch.zeros_like(before)
    for key, block in opt.coverage().blocks.items():
        index = layer_index(opt.view, block)
        inverse = invert_block(opt._running.factors[key], 16 * lam, form).to_dense()
        direction[index] = -inverse @ gradient[index]
    curvature = F + lam * torch.eye(len(F), dtype=F.dtype)
    alpha = -(gradient @ direction) / (direction @ curvature @ direction)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(after - before, alpha * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_the_loss_falls(name: str) -> None:
    model, x, y = small(name)
    opt = ng.KFAC(model, ng.Categorical("element"))
    first = opt.step(x, y)
    for _ in range(20):
        opt.step(x, y)
    assert ng.Categorical("element").nll(model(x), y) < 0.1 * first


def test_a_checkpoint_continues_bit_for_bit() -> None:
    model, x, y = small("transformer")
    opt = ng.KFAC(model, ng.Categorical())
    for _ in range(3):
        opt.step(x, y)
    other, *_ = small("transformer")
    other.load_state_dict(model.state_dict())
    again = ng.KFAC(other, ng.Categorical())
    again.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(x, y)
        again.step(x, y)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_weight_that_is_no_view_of_its_block_is_refused() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 2)).double()
    with pytest.raises(ValueError, match=r"0\.weight: the rule of ConvTranspose1d copies it.*Preconditioner"):
        ng.KFAC(model, ng.Gaussian())
    pre = ng.Preconditioner(model, ng.Gaussian())
    z = model(draw(3, 4, 3))
    pre.observe(z)
    z.square().sum().backward()
    pre.step()
    assert pre.stats["bare"] == 0
