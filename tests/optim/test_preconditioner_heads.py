"""Models of which an output that is observed shows a part: further heads, experts that a batch does not ask."""

import copy
from typing import Any

import pytest
import torch
from oracles.layers import draw
from oracles.preconditioning import EVERY_STEP, exact, fisher
from torch import Tensor, nn

import natgrad as ng

LIKELIHOOD = ng.Categorical()
Y = torch.arange(9) % 3


class Heads(nn.Module):
    """A trunk with two heads; the second one has an embedding, a normalisation and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first = nn.Linear(4, 5), nn.Linear(5, 3)
        self.norm, self.second, self.shift = nn.LayerNorm(5), nn.Linear(5, 3), nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.first(h), self.second(self.norm(h)) + self.shift


def loss_of(model: Heads, x: Tensor, pre: ng.Preconditioner, how: str) -> Tensor:
    model.zero_grad()
    if how == "update":
        pre.update(x, Y)
    one, two = model(x)
    if how == "observe":
        pre.observe(one, Y)
    return LIKELIHOOD.nll(one, Y) + 3 * LIKELIHOOD.nll(two, Y)


def first_head(model: nn.Module, x: Any) -> Tensor:
    return model(x)[0]


@pytest.mark.parametrize("how", ["observe", "update"])
@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac"])
@pytest.mark.parametrize("expectation", ["sampled", "exact", "empirical"])
def test_a_head_that_is_not_observed_keeps_its_gradient(expectation: Any, structure: str, how: str) -> None:
    """Its factors are not zero but unknown: divided by the damping alone its gradient would explode."""
    model, x = Heads(), draw(9, 4)
    given = {"structure": structure, "expectation": expectation, "forward": first_head, "form": None}
    if expectation == "empirical":  # the loss has to be that of the observed output
        given["exclude"] = ["shift"]
    pre = exact(model, LIKELIHOOD, **given)
    if expectation == "empirical" and how == "observe":
        model.zero_grad()
        one, two = model(x)
        pre.observe(one, Y)
        (LIKELIHOOD.nll(one, Y) + 0 * two.sum()).backward()
        own = [model.second.weight, model.norm.weight]
    else:
        loss_of(model, x, pre, how).backward()
        own = [model.second.weight, model.second.bias, model.norm.weight, model.shift]
    before = [p.grad.clone() for p in own]
    trunk = model.trunk.weight.grad.clone()
    pre.step()
    torch.testing.assert_close([p.grad for p in own], before, rtol=0, atol=0)
    assert (model.trunk.weight.grad - trunk).norm() > 0.1 * trunk.norm()
    assert pre.stats["bare"] == (2 if expectation == "empirical" else 3)
    assert pre.stats["failed_inverses"] == 0


def test_the_rest_is_that_of_the_observed_head() -> None:
    model, x = Heads(), draw(9, 4)
    pre = exact(model, LIKELIHOOD)
    loss_of(model, x, pre, "observe").backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    pre.step()
    twin = nn.Sequential(copy.deepcopy(model.trunk), nn.Tanh(), copy.deepcopy(model.first))
    F = fisher(twin, LIKELIHOOD, x).to_dense()[:25, :25]
    g = torch.cat([gradients["trunk.weight"].flatten(), gradients["trunk.bias"]])
    U = torch.linalg.solve(F + 0.1 * torch.eye(25, dtype=F.dtype), g)
    torch.testing.assert_close(torch.cat([model.trunk.weight.grad.flatten(), model.trunk.bias.grad]), U)


def test_two_outputs_of_one_pass_are_observed_at_once() -> None:
    model, x = Heads(), draw(9, 4)
    pre = exact(model, LIKELIHOOD)
    one, two = model(x)
    pre.observe(one)
    with pytest.raises(
        ValueError, match=r"'trunk' was observed already, with another output.*stack\(\[z1, z2\], dim=1"
    ):
        pre.observe(two)
    pre.skip()
    z = torch.stack(model(x), dim=1)  # [batch, heads, classes]
    pre.observe(z)
    LIKELIHOOD.nll(z, torch.stack([Y, Y], dim=1)).backward()
    pre.step()
    assert pre.stats["bare"] == 0


class Experts(nn.Module):
    """The sign of the first feature says which layer an example goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        up = x[:, 0] > 0
        h = x.new_zeros(len(x), 5)
        for where, expert in ((up, self.high), (~up, self.low)):
            if where.any():
                h = h.index_put((where.nonzero()[:, 0],), expert(x[where]))
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac"])
def test_an_expert_that_is_asked_later_starts_with_its_own_estimate(structure: str) -> None:
    up, down = draw(9, 4).abs(), -draw(9, 4, seed=1).abs()
    model = Experts()
    # Inverses of what is known are renewed at the first step alone.
    periods = ng.Renewal(1000, (1,), 1)
    pre = exact(model, LIKELIHOOD, structure=structure, form=None, periods=periods)
    for x in (up, up, up, down):
        model.zero_grad()
        z = model(x)
        pre.observe(z)
        LIKELIHOOD.nll(z, Y).backward()
        plain = None if model.low.weight.grad is None else model.low.weight.grad.clone()
        pre.step()
    assert plain is not None and pre.stats["bare"] == 0
    fresh = exact(copy.deepcopy(model), LIKELIHOOD, structure=structure, form=None)
    fresh.update(down)
    fresh.view.module.low.weight.grad = torch.zeros_like(plain)
    fresh.step()
    found, expected = (p._running.factors["low"] for p in (pre, fresh))
    torch.testing.assert_close(found.A, expected.A)
    torch.testing.assert_close(found.G, expected.G)  # neither is thinned by the batches that did not ask it
    known = copy.deepcopy(pre._running.factors["low"])
    model.zero_grad()
    z = model(up)
    pre.observe(z)
    LIKELIHOOD.nll(z, Y).backward()
    pre.step()
    torch.testing.assert_close(pre._running.factors["low"].A, known.A, rtol=0, atol=0)


def test_a_checkpoint_remembers_who_was_seen() -> None:
    model, x = Heads(), draw(9, 4)
    pre = exact(model, LIKELIHOOD)
    loss_of(model, x, pre, "observe").backward()
    pre.step()
    other = copy.deepcopy(model)
    resumed = exact(other, LIKELIHOOD)
    resumed.load_state_dict(pre.state_dict())
    for _ in range(2):
        for m, p in ((model, pre), (other, resumed)):
            loss_of(m, x, p, "observe").backward()
            p.step()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        assert resumed.stats["bare"] == pre.stats["bare"] == 3


def test_an_output_without_any_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    pre = exact(model, LIKELIHOOD, periods=EVERY_STEP, forward=lambda model, x: model(x).detach())
    pre.update(draw(9, 4))
    model(draw(9, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="depends on no covered layer .*use_reentrant=True"):
        pre.step()
