"""Tables 3.I and 3.II of the thesis against automatic differentiation, and the identity of its section 3.3.3."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.likelihoods import tables

GENERATOR = torch.Generator().manual_seed(0)
P = torch.rand(5, 3, generator=GENERATOR, dtype=torch.float64) * 0.9 + 0.05
SIMPLEX = P / P.sum(1, keepdim=True)
SOFT = torch.rand(5, 3, generator=GENERATOR, dtype=torch.float64)
HARD = (SOFT > 0.5).double()
ONE_HOT = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 2, 1, 1, 0])]

CASES: dict[str, tuple[Any, Tensor, Tensor]] = {
    "gaussian": (ng.Gaussian(variance=0.5), P, SOFT),
    "bernoulli": (ng.Bernoulli(), P, HARD),
    "bernoulli, soft": (ng.Bernoulli(), P, SOFT),
    "categorical": (ng.Categorical(), SIMPLEX, ONE_HOT),
    "categorical, soft": (ng.Categorical(), SIMPLEX, SOFT / SOFT.sum(1, keepdim=True)),
}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_against_automatic_differentiation(name: str) -> None:
    likelihood, f, y = CASES[name]
    close(tables.derivative(likelihood, f, y), torch.func.grad(lambda g: tables.loss(likelihood, g, y).sum())(f))
    for i in range(len(f)):
        H = torch.func.hessian(lambda g, i=i: tables.loss(likelihood, g, y[i : i + 1])[0])(f[i : i + 1])
        close(torch.diag(tables.second_derivative(likelihood, f, y)[i]), H.reshape(3, 3))


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
def test_the_loss_is_the_likelihood_s(name: str) -> None:
    likelihood, _, y = CASES[name]
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = y.argmax(1) if name == "categorical" else y
    f = likelihood.to_mean(z)
    close(tables.loss(likelihood, f, targets).mean(), likelihood.nll(z, targets))
    close(tables.second_derivative(likelihood, f, targets), tables.second_derivative(likelihood, f, y))


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_the_fisher_weight_is_the_mean_of_the_second_derivative(name: str) -> None:
    """Over all outcomes, each with its probability; and the mean of the squared gradient is the same."""
    likelihood, f, _ = CASES[name]
    outcomes = (0.0, 1.0) if name == "bernoulli" else tuple(torch.eye(3, dtype=torch.float64))
    second, squared = torch.zeros_like(f), torch.zeros_like(f)
    for k, outcome in enumerate(outcomes):
        y = (torch.zeros_like(f) + outcome).contiguous()
        probability = (f if outcome else 1 - f) if name == "bernoulli" else f[:, k : k + 1]
        second += probability * tables.second_derivative(likelihood, f, y)
        squared += probability * tables.derivative(likelihood, f, y).square()
    close(tables.fisher_weight(likelihood, f), second)
    close(tables.fisher_weight(likelihood, f), squared)


def test_the_quadratic_error_has_a_two() -> None:
    """‖f − y‖² is variance ½: second derivative and Fisher weight 2, where the thesis prints I."""
    likelihood, f, y = CASES["gaussian"]
    close(tables.loss(likelihood, f, y), (f - y).square().sum(1))
    close(tables.second_derivative(likelihood, f, y), torch.full_like(f, 2.0))
    close(tables.fisher_weight(likelihood, f), torch.full_like(f, 2.0))
    close(tables.fisher_weight(ng.Gaussian(), f), torch.ones_like(f))


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "bernoulli, soft", "categorical"])
def test_carried_to_the_parameters_they_are_the_operators(name: str) -> None:
    likelihood, _, y = CASES[name]
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64, generator=GENERATOR)
    targets = y.argmax(1) if name == "categorical" else y
    z = model(x)
    f = likelihood.to_mean(z).detach()

    def outputs(weight: Tensor, bias: Tensor) -> Tensor:
        return likelihood.to_mean(torch.nn.functional.linear(x, weight, bias))

    J = torch.cat([j.flatten(2) for j in torch.func.jacrev(outputs, argnums=(0, 1))(model.weight, model.bias)], 2)
    for weight, operator in (
        (
            tables.second_derivative(likelihood, f, targets),
            ng.GaussNewton(model, likelihood, x, targets, linearize="probabilities"),
        ),
        (tables.fisher_weight(likelihood, f), ng.Fisher(model, likelihood, x, parametrization="probabilities")),
    ):
        close(operator.to_dense(), torch.einsum("nop,no,noq->pq", J, weight, J).detach() / len(x))


@pytest.mark.parametrize(
    ("likelihood", "f", "y"),
    [
        (ng.Bernoulli(), P[:, :1], HARD[:, :1]),
        (ng.Categorical(), SIMPLEX, ONE_HOT),
        (ng.Categorical(), SIMPLEX, ONE_HOT.argmax(1)),
    ],
    ids=["one hard binary output", "one-hot classes", "classes"],
)
def test_where_the_identity_of_section_3_3_3_holds(likelihood: Any, f: Tensor, y: Tensor) -> None:
    excess = tables.outer_product_excess(likelihood, f, y)
    close(excess, torch.zeros_like(excess))
    root = tables.second_derivative(likelihood, f, y).sqrt()
    close(root, tables.derivative(likelihood, f, y).abs())  # √D = −∂l/∂f at the true class, else 0
    model = nn.Linear(2, f.shape[1]).double()
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = y if isinstance(likelihood, ng.Bernoulli) or y.ndim == 1 else y.argmax(1)
    newton = ng.GaussNewton(model, likelihood, x, targets, linearize="probabilities")
    close(newton.to_dense(), ng.EmpiricalFisher(model, likelihood, x, targets).to_dense())


@pytest.mark.parametrize(
    ("likelihood", "f", "y", "smallest"),
    [
        (ng.Bernoulli(), P[:, :1], SOFT[:, :1], 1.0),
        (ng.Bernoulli(), P, HARD, 1.0),
        (ng.Categorical(), SIMPLEX, SOFT / SOFT.sum(1, keepdim=True), 0.5),
        (ng.Gaussian(), P, SOFT, 0.5),
    ],
    ids=["a soft binary target", "several binary outputs", "soft classes", "quadratic error"],
)
def test_where_it_fails(likelihood: Any, f: Tensor, y: Tensor, smallest: float) -> None:
    excess = tables.outer_product_excess(likelihood, f, y)
    assert bool((excess.abs().amax((1, 2)) > smallest).all())


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="the tables know Gaussian, Bernoulli and Categorical, not Poisson"):
        tables.fisher_weight(ng.Poisson(), P)
    with pytest.raises(ValueError, match=r"y: expected targets of shape \(5, 3\)"):
        tables.loss(ng.Bernoulli(), P, HARD[:, :1])
