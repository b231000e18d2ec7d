"""Inputs that are the same at every update: their factor A is that of the whole training set."""

import copy
import math
from typing import Any

import pytest
import torch
from oracles.kfac import EVERY_ROW, FIXED, NO_UPDATE, data, dense_factors, dense_update, gradient_of, mlp, vector
from oracles.networks import TwoInputs
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import ExactTikhonov
from natgrad.optim.settings import Damping, Subsets

LIKELIHOOD = ng.Bernoulli()


def inputs(*shape: int, seed: int = 7) -> Tensor:
    """All inputs of a training set; an entry is constant, as the border pixels of pictures are."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 0.3
    x[..., 0] = 0.0
    return x


def second_moment(x: Tensor) -> Tensor:
    """``1/N Σ [x 1][x 1]ᵀ`` by a loop; further dimensions are uses of the layer and are summed."""
    total = torch.zeros(x.shape[-1] + 1, x.shape[-1] + 1, dtype=torch.float64)
    for row in x.reshape(-1, x.shape[-1]):
        a = torch.cat([row, torch.ones(1, dtype=torch.float64)])
        total += torch.outer(a, a)
    return total / x.shape[0]


@pytest.mark.parametrize("subsets", [EVERY_ROW, Subsets(1 / 8, 1 / 4)], ids=["all", "some"])
def test_a_is_the_moment_of_all_inputs_at_every_update_whatever_the_batch(subsets: Subsets) -> None:
    everything, model = inputs(50, 4), mlp(4, 5, 3)
    opt = ng.KFAC(model, LIKELIHOOD, static_inputs=everything, subsets=subsets)
    expected, start = second_moment(everything), vector(model)
    for k, rows in enumerate(([0, 1, 2], range(8, 48), [49])):
        x = everything[list(rows)]
        opt.step(x, torch.full((len(x), 3), 0.2 + 0.3 * k, dtype=torch.float64))
        torch.testing.assert_close(dense_factors(opt)["0"].A, expected, rtol=1e-12, atol=1e-14)
    assert not torch.equal(start, vector(model))


def test_the_other_factors_are_those_of_an_optimiser_without_static_inputs() -> None:
    everything, models = inputs(40, 4), [mlp(4, 5, 6, 3), mlp(4, 5, 6, 3)]
    settings = {"guard": NO_UPDATE, "subsets": Subsets(0.2, 0.5)}
    static, plain = (
        ng.KFAC(model, LIKELIHOOD, static_inputs=given, **settings)
        for model, given in zip(models, (everything, None), strict=True)
    )
    for k in range(3):
        x, y = everything[10 * k : 10 * k + 10], data(LIKELIHOOD, 4, 3, n=10, seed=k)[1]
        static.step(x, y), plain.step(x, y)
        found, expected = dense_factors(static), dense_factors(plain)
        assert not torch.allclose(found["0"].A, expected["0"].A, rtol=0.01)
        for name in expected:
            assert torch.equal(found[name].G, expected[name].G)
            assert name == "0" or torch.equal(found[name].A, expected[name].A)


def test_the_update_has_the_moment_of_all_inputs_in_its_inverse() -> None:
    """One layer with Gaussian noise, whose G is known: nothing of the curvature comes from a sample."""
    everything, likelihood, lam, l2 = inputs(30, 4), ng.Gaussian(variance=0.7), 0.2, 0.05
    model, x = mlp(4, 2), everything[:6]
    y = data(likelihood, 4, 2, n=6)[1]
    start, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
    A = torch.kron(torch.eye(2, dtype=torch.float64) / 0.7, second_moment(everything))  # order: rows of [W b]
    order = torch.tensor([0, 1, 2, 3, 8, 4, 5, 6, 7, 9])  # of W, then b, to rows of [W b]
    damped = A + 4 * (lam + l2) * torch.eye(10, dtype=torch.float64)
    direction = torch.empty(10, dtype=torch.float64)
    direction[order] = -torch.linalg.solve(damped, gradient[order])
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt = ng.KFAC(
        model, likelihood, damping=Damping(lam, ExactTikhonov(), ratio=2.0), l2=l2, static_inputs=everything, **FIXED
    )
    opt.step(x, y)
    expected = start + dense_update(F, lam + l2, gradient, direction)
    torch.testing.assert_close(vector(model), expected, rtol=1e-9, atol=1e-11)


def test_positions_and_several_inputs() -> None:
    everything = inputs(20, 3, 4)
    opt = ng.KFAC(mlp(4, 5, 2), LIKELIHOOD, static_inputs=everything)
    opt.step(everything[:5], torch.full((5, 3, 2), 0.4, dtype=torch.float64))
    torch.testing.assert_close(dense_factors(opt)["0"].A, second_moment(everything))
    images = inputs(20, 2, 3)
    opt = ng.KFAC(nn.Sequential(nn.Flatten(), mlp(6, 2)), LIKELIHOOD, static_inputs=images)
    opt.step(images[:5], torch.full((5, 2), 0.4, dtype=torch.float64))
    torch.testing.assert_close(dense_factors(opt)["1.0"].A, second_moment(images.flatten(1)))
    a, b = inputs(20, 2), inputs(20, 4, seed=8)
    opt = ng.KFAC(TwoInputs().double(), LIKELIHOOD, static_inputs={"a": a, "b": b})
    opt.step({"a": a[:5], "b": b[:5]}, torch.full((5, 3), 0.4, dtype=torch.float64))
    torch.testing.assert_close(dense_factors(opt)["left"].A, second_moment(a))
    torch.testing.assert_close(dense_factors(opt)["right"].A, second_moment(b)[:-1, :-1])  # it has no bias


@pytest.mark.parametrize("changed", ["by a layer", "by forward"])
def test_inputs_that_no_layer_sees_as_they_are(changed: str) -> None:
    everything = inputs(20, 4)
    settings: dict[str, Any] = {"static_inputs": everything, "damping": 0.3}
    if changed == "by a layer":
        model: nn.Module = nn.Sequential(nn.Tanh(), mlp(4, 3))
    else:
        model, settings["forward"] = mlp(4, 3), lambda model, x: model(2 * x)
    before = vector(model)
    with pytest.raises(ValueError, match="static_inputs: no covered layer.*leave static_inputs out"):
        ng.KFAC(model, LIKELIHOOD, **settings).step(everything[:5], torch.full((5, 3), 0.4, dtype=torch.float64))
    assert torch.equal(before, vector(model))


BATCH = (5, 4)
UNFIT: dict[str, Any] = {
    "structure": ({}, "inputs"),
    "empty": (torch.zeros(0, 4, dtype=torch.float64), "empty"),
    "no tensor": ("inputs", "inputs"),
    "width": (inputs(20, 8), "static_inputs"),
    "nan": (torch.full((20, 4), math.nan, dtype=torch.float64), "static_inputs"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_static_inputs_that_do_not_fit(kind: str) -> None:
    wrong, message = UNFIT[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        opt = ng.KFAC(mlp(4, 3), LIKELIHOOD, static_inputs=wrong)
        opt.step(inputs(*BATCH), torch.full((5, 3), 0.4, dtype=torch.float64))


class Rearranged(nn.Module):
    """Looks at its inputs [examples, positions, features] in another order of the dimensions, without copying them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.fc = how, nn.Linear(3 if how == "over positions" else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flattened":
            return self.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.how == "positions first":
            return self.fc(x.transpose(0, 1)).transpose(0, 1)
        return self.fc(x.transpose(1, 2))


@pytest.mark.parametrize("how", ["flattened", "positions first", "over positions"])
def test_layers_that_see_a_view_of_the_inputs(how: str) -> None:
    """A is that of the layer's own rows, or the inputs are refused because no layer sees them as they are."""
    everything, model = inputs(20, 3, 4), Rearranged(how).double()
    opt = ng.KFAC(model, LIKELIHOOD, static_inputs=everything, damping=0.3)
    seen = everything.transpose(1, 2) if how == "over positions" else everything
    x = everything[:7]
    y = torch.full(model(x).shape, 0.4, dtype=torch.float64)
    if how == "over positions":
        with pytest.raises(ValueError, match="static_inputs: no covered layer"):
            opt.step(x, y)
        return
    opt.step(x, y)
    torch.testing.assert_close(dense_factors(opt)["fc"].A, second_moment(seen))


def test_resuming_with_static_inputs_equals_an_uninterrupted_run() -> None:
    everything = inputs(40, 4)

    def make() -> tuple[nn.Module, ng.KFAC]:
        model = mlp(4, 5, 3)
        return model, ng.KFAC(model, LIKELIHOOD, static_inputs=everything, seed=3, subsets=Subsets(0.2, 0.5))

    def train(opt: ng.KFAC, first: int, last: int) -> list[float]:
        batches = (everything[4 * k : 4 * k + 12] for k in range(first, last))
        return [opt.step(x, x[:, 1:].sigmoid()).item() for x in batches]

    model, opt = make()
    train(opt, 0, 4)
    weights, state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    losses = train(opt, 4, 7)
    again, resumed = make()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert train(resumed, 4, 7) == losses
    assert torch.equal(vector(model), vector(again)) and dict(opt.stats) == dict(resumed.stats)
