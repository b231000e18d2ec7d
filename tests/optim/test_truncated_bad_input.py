"""What the truncated-Newton family says of systems, batches and gradients that do not fit; nothing moves."""

import math
from typing import Any

import pytest
import torch
from oracles.kfac import data, mlp, vector
from torch import Tensor, nn

import natgrad as ng


class Times(ng.Gaussian):
    """A Fisher product that is multiplied by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return self.factor * v


MAKERS: dict[str, Any] = {
    "cg": lambda model, likelihood: ng.NaturalGradient(model, likelihood, solver="cg", damping=1e-3),
    "minres_qlp": lambda model, likelihood: ng.NaturalGradient(model, likelihood, damping=1e-3),
    "hessian-free": lambda model, likelihood: ng.HessianFree(model, likelihood, curvature="metric", damping=1e-3),
    "krylov": lambda model, likelihood: ng.KrylovDescent(model, likelihood, curvature="metric"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_products_that_are_not_finite(name: str) -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    before, opt = vector(model), MAKERS[name](model, Times(math.nan))
    opt.step(x, y)
    assert opt.stats["reason"].startswith("non_finite") and not opt.stats["accepted"]
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("name", ["cg", "hessian-free"])
def test_indefinite_systems_are_reported_by_cg(name: str) -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    opt = MAKERS[name](model, Times(-10.0))
    opt.step(x, y)
    assert opt.stats["reason"] == "negative_curvature"


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_of_zero_moves_nothing(name: str) -> None:
    model, (x, _) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    before, opt = vector(model), MAKERS[name](model, ng.Gaussian())
    assert opt.step(x, model(x).detach()) == 0
    assert opt.stats["reason"] in ("zero_rhs", "zero_gradient") and opt.stats["step_norm"] == 0
    assert torch.equal(vector(model), before) and opt.stats["skipped"] == 0


@pytest.mark.parametrize(
    ("argument", "name"), [("curvature_batch", "hessian-free"), ("search_batch", "krylov")], ids=["hf", "krylov"]
)
def test_other_batches_that_do_not_fit(argument: str, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = data(ng.Gaussian(), 4, 3)
    before, opt = vector(model), MAKERS[name](model, ng.Gaussian())
    cases: list[tuple[Any, type[Exception], str]] = [
        ((x[:, :2], y), ValueError, rf"{argument}: \[12, 2\] torch.float64; expected what inputs have, \[12, 4\]"),
        ((x.float(), y), ValueError, f"{argument}: .*torch.float32; expected"),
        ((x[:0], y[:0]), ValueError, f"{argument}: inputs: the batch is empty"),
        ((x, y[:5]), ValueError, f"{argument}: targets: 5 examples for 12 inputs"),
        (x, TypeError, rf"{argument}: expected a pair \(inputs, targets\), got Tensor"),
        ((x, None), TypeError, rf"{argument}: expected a pair"),
        ((x, y[:, :2]), ValueError, rf"{argument}: targets: .*\(12, 3\).*\(12, 2\)"),
    ]
    for batch, error, message in cases:
        with pytest.raises(error, match=message):
            opt.step(x, y, **{argument: batch})
    assert torch.equal(vector(model), before) and opt.state_dict()["param_groups"][0]["update"] == 0
    opt.step(x, y, **{argument: (x[:5], y[:5])})
    assert opt.state_dict()["param_groups"][0]["update"] == 1
