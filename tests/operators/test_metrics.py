"""The metrics of [NATGRAD, sec. 3, 7, 8.2] written out, in both parametrisations, and when Gauss-Newton equals them."""

from typing import Any

import pytest
import torch
from oracles.kfac import data, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad import InnerSolve

LIKELIHOODS = {
    "linear": ng.Gaussian(variance=0.25),
    "sigmoid": ng.Bernoulli(),
    "softmax": ng.Categorical(),
}


def jacobian(model: nn.Module, function: Any, x: Tensor) -> Tensor:
    """d function(z(x)) / dθ, ``[batch, outputs, P]``, by reverse mode one output at a time."""
    parameters = list(model.parameters())
    y = function(model(x))
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in y.reshape(-1)]
    return torch.stack([nn.utils.parameters_to_vector(row) for row in rows]).reshape(*y.shape, -1)


def metric(output: str, model: nn.Module, x: Tensor) -> Tensor:
    """Eqs. 9-11 (the appendix: 24, 26, 28), with the variance where it belongs (see the errata)."""
    z = model(x).detach()
    if output == "linear":
        J = jacobian(model, lambda z: z, x)
        return torch.einsum("nop,noq->pq", J, J) / 0.25 / len(x)
    if output == "sigmoid":
        J, y = jacobian(model, torch.sigmoid, x), torch.sigmoid(z)
        return torch.einsum("nop,no,noq->pq", J, 1 / (y * (1 - y)), J) / len(x)
    J, y = jacobian(model, lambda z: z.softmax(-1), x), z.softmax(-1)
    return torch.einsum("nop,no,noq->pq", J, 1 / y, J) / len(x)


@pytest.mark.parametrize("parametrization", ["logits", "probabilities"])
@pytest.mark.parametrize("output", LIKELIHOODS)
def test_the_metric_is_the_formula_of_the_paper(output: str, parametrization: Any) -> None:
    model, x = mlp(3, 4, 3), data(ng.Gaussian(), 3, 3)[0]
    found = ng.Fisher(model, LIKELIHOODS[output], x, parametrization=parametrization).to_dense()
    torch.testing.assert_close(found, metric(output, model, x))


@pytest.mark.parametrize("output", LIKELIHOODS)
def test_extended_gauss_newton_is_the_metric_for_matching_losses(output: str) -> None:
    """Eqs. 14-21: up to the pre-activations r the targets do not matter."""
    model, likelihood = mlp(3, 4, 3), LIKELIHOODS[output]
    for seed in (1, 2):
        x, y = data(likelihood, 3, 3, seed=seed)
        found = ng.GaussNewton(model, likelihood, x, y).to_dense()
        torch.testing.assert_close(found, metric(output, model, x))


class SquaredErrorOfSigmoid:
    """N(σ(z), 1): squared errors on sigmoid units, the pair of loss and output that does not match."""

    def nll(self, z: Tensor, y: Tensor, *, weight: Any = None, count: Any = None) -> Tensor:
        return 0.5 * (torch.sigmoid(z) - y).square().sum() / (self.count(z) if count is None else count)

    def count(self, z: Tensor, y: Any = None, weight: Any = None) -> Tensor:
        return z.new_tensor(len(z))

    def slope(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * (1 - torch.sigmoid(z))

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return self.slope(z).square() * v

    def fisher_factor(self, z: Tensor) -> Tensor:
        return torch.diag_embed(self.slope(z))

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.sigmoid(z) + torch.randn(z.shape, generator=generator, dtype=z.dtype)


def test_gauss_newton_differs_for_a_loss_that_does_not_match() -> None:
    model, likelihood = mlp(3, 4, 3), SquaredErrorOfSigmoid()
    x, y = data(ng.Gaussian(), 3, 3)
    G = ng.Fisher(model, likelihood, x).to_dense()
    N = ng.GaussNewton(model, likelihood, x, y).to_dense()
    J, f = jacobian(model, lambda z: z, x), torch.sigmoid(model(x)).detach()
    slope, bend = f * (1 - f), f * (1 - f) * (1 - 2 * f)
    torch.testing.assert_close(G, torch.einsum("nop,no,noq->pq", J, slope.square(), J) / len(x))
    second = slope.square() + (f - y) * bend
    torch.testing.assert_close(N, torch.einsum("nop,no,noq->pq", J, second, J) / len(x))
    assert (G - N).norm() > 0.05 * G.norm()


class Reparametrised(nn.Module):
    """A network whose parameters are functions of others: θ = sinh(2 ξ)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "body", model)  # its parameters are none of this module's
        self.xi = nn.ParameterDict({
            name.replace(".", "_"): nn.Parameter(torch.asinh(p.detach()) / 2) for name, p in model.named_parameters()
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        values = {name: torch.sinh(2 * self.xi[name.replace(".", "_")]) for name, _ in self.body.named_parameters()}
        return torch.func.functional_call(self.body, values, (x,))


def gap(likelihood: Any, size: float, optimiser: Any) -> float:
    """The distance of both networks' outputs after a step of a size in each parametrisation."""
    model = mlp(2, 2, 1)
    other = Reparametrised(mlp(2, 2, 1))
    x, y = data(likelihood, 2, 1, n=60)
    torch.testing.assert_close(model(x), other(x))
    for net in (model, other):
        optimiser(net, likelihood, size, x, y)
    return float((model(x) - other(x)).norm())


def natural(net: nn.Module, likelihood: Any, size: float, x: Tensor, y: Tensor) -> None:
    solver = ng.KrylovSolver("minres_qlp", tol=1e-12, max_iters=200)
    ng.NaturalGradient(net, likelihood, solver=solver, lr=size, damping=0.0, rule=None, guard=False).step(x, y)


def plain(net: nn.Module, likelihood: Any, size: float, x: Tensor, y: Tensor) -> None:
    opt = torch.optim.SGD(net.parameters(), lr=size)
    likelihood.nll(net(x), y).backward()
    opt.step()


@pytest.mark.parametrize("output", ["linear", "sigmoid"])
def test_the_natural_gradient_does_not_depend_on_the_parameters(output: str) -> None:
    """[NATGRAD, sec. 4.1]: halving the step quarters the difference; halving a gradient step halves it."""
    likelihood = LIKELIHOODS[output]
    eigenvalues = torch.linalg.eigvalsh(ng.Fisher(mlp(2, 2, 1), likelihood, data(likelihood, 2, 1, n=60)[0]).to_dense())
    assert eigenvalues[0] > 1e-8 * eigenvalues[-1]  # G is not singular
    gaps = [gap(likelihood, 2e-3 / 2**k, natural) for k in range(3)]
    for larger, smaller in zip(gaps, gaps[1:], strict=False):
        assert larger / smaller == pytest.approx(4, abs=0.3)
    gaps = [gap(likelihood, 2e-3 / 2**k, plain) for k in range(3)]
    for larger, smaller in zip(gaps, gaps[1:], strict=False):
        assert larger / smaller == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("output", LIKELIHOODS)
def test_hessian_free_with_gauss_newton_is_the_natural_gradient(output: str) -> None:
    """[NATGRAD, sec. 7]: for matching losses, step by step."""
    likelihood, models = LIKELIHOODS[output], (mlp(4, 5, 3), mlp(4, 5, 3))
    solve = InnerSolve(max_iters=12, progress=None, warm_start=0.0, exponent=0.0, store=None)
    hf = ng.HessianFree(models[0], likelihood, damping=0.3, rule=None, solve=solve, search=None)
    natural_gradient = ng.NaturalGradient(
        models[1], likelihood, solver=ng.KrylovSolver("cg", tol=0.0, max_iters=12), damping=0.3, rule=None, guard=False
    )
    for seed in range(4):
        x, y = data(likelihood, 4, 3, seed=seed)
        hf.step(x, y)
        natural_gradient.step(x, y)
        torch.testing.assert_close(vector(models[0]), vector(models[1]), rtol=1e-7, atol=1e-10)
