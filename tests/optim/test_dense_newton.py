"""Newton's step, whole, in blocks and regularised, against solves written out; the learning rate 1/λ_max."""

from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, mlp, targets
from torch import Tensor, nn

import natgrad as ng
from natgrad.linalg.lanczos import lanczos
from natgrad.training import inverse_largest_eigenvalue

GAUSSIAN = ng.Gaussian()


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def derivatives(model: nn.Module, likelihood: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian by differentiating a function of one vector."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        named = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return likelihood.nll(torch.func.functional_call(model, named, (x,)), y)

    theta = vector(model)
    return torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)


def test_one_step_minimises_a_quadratic() -> None:
    model, x, y = mlp(4, 3), batch(), targets(GAUSSIAN)
    ng.Newton(model, GAUSSIAN).step(x, y)
    ones = torch.cat([x, torch.ones(12, 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(ones, y).solution.T
    torch.testing.assert_close(torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach(), best)


@pytest.mark.parametrize("likelihood", [GAUSSIAN, ng.Categorical()], ids=repr)
@pytest.mark.parametrize("damping", [0.0, 2.0])
@pytest.mark.parametrize("structure", ["full", "block_diagonal"])
def test_the_step_solves_the_system(likelihood: Any, damping: float, structure: Any) -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    if isinstance(likelihood, ng.Categorical) and damping == 0:
        damping = 1e-2  # softmax does not see a constant added to the logits
    g, H = derivatives(model, likelihood, x, y)
    if structure == "block_diagonal":
        mask = torch.zeros_like(H)
        mask[:15, :15] = mask[15:, 15:] = 1
        H = H * mask
    before = vector(model)
    loss = likelihood.nll(model(x), y)
    opt = ng.Newton(model, likelihood, lr=0.5, damping=damping, structure=structure)
    torch.testing.assert_close(opt.step(x, y), loss.detach())
    expected = torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), g)
    torch.testing.assert_close(before - vector(model), 0.5 * expected, rtol=1e-7, atol=1e-9)


def test_it_converges_quadratically() -> None:
    """Logistic regression with soft targets: convex, with one minimum."""
    likelihood = ng.Bernoulli()
    model, x, y = mlp(4, 2), batch(), targets(likelihood, outputs=2)
    opt = ng.Newton(model, likelihood)
    for _ in range(8):
        opt.step(x, y)
    minimum = vector(model)
    assert derivatives(model, likelihood, x, y)[0].norm() < 1e-12
    nn.utils.vector_to_parameters(minimum + 0.1, model.parameters())
    errors = []
    for _ in range(4):
        errors.append(float((vector(model) - minimum).norm()))
        opt.step(x, y)
    for before, after in zip(errors, errors[1:], strict=False):
        assert after < 2 * before**2 + 1e-13
    assert errors[2] > 1e-12 or errors[1] < 1e-5


def test_bad_batches_and_refusals() -> None:
    model, x, y = mlp(4, 3), batch(), targets(GAUSSIAN)
    opt = ng.Newton(model, GAUSSIAN)
    before = vector(model)
    opt.step(torch.where(x > 1, torch.nan, x), y)
    assert torch.equal(vector(model), before) and opt.stats["skipped"] == 1
    constant = x.clone()
    constant[:, 2] = 0.0
    with pytest.raises(ValueError, match=r"singular with damping=0; pass a damping, for example \d"):
        opt.step(constant, y)
    assert torch.equal(vector(model), before)
    with pytest.raises(ValueError, match="structure='diagonal'"):
        ng.Newton(model, GAUSSIAN, structure="diagonal")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="damping=-1"):
        ng.Newton(model, GAUSSIAN, damping=-1.0)
    with pytest.raises(ValueError, match="a block of 10100 parameters"):
        ng.Newton(nn.Linear(100, 100), GAUSSIAN)
    with pytest.raises(TypeError, match="takes no closure"):
        opt.step(closure=lambda: None)


@pytest.mark.parametrize("n", [1, 5, 30])
def test_lanczos_finds_the_spectrum(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    B = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A, start = B + B.T, torch.randn(n, generator=generator, dtype=torch.float64)
    values, vectors = lanczos(lambda v: A @ v, start, n)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A @ vectors, vectors * values, rtol=1e-7, atol=1e-7)
    few = lanczos(lambda v: A @ v, start, 12).values
    assert few[-1] <= values[-1] + 1e-9 and few[-1] > 0.99 * values[-1]


def test_lanczos_stops_where_the_space_is_exhausted() -> None:
    A = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    found = lanczos(lambda v: A @ v, torch.ones(4, dtype=torch.float64), 4)
    torch.testing.assert_close(found.values, torch.tensor([1.0, 3.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="start: expected"):
        lanczos(lambda v: A @ v, torch.zeros(4), 2)
    with pytest.raises(ValueError, match="steps=0"):
        lanczos(lambda v: A @ v, torch.ones(4), 0)


def test_the_learning_rate_is_one_over_the_largest_eigenvalue() -> None:
    model, x, y = mlp(4, 5, 3), batch(), targets(GAUSSIAN)
    _, H = derivatives(model, GAUSSIAN, x, y)
    rate = inverse_largest_eigenvalue(model, GAUSSIAN, x, y)
    torch.testing.assert_close(rate, 1 / torch.linalg.eigvalsh(H)[-1], rtol=1e-8, atol=0)
    assert torch.equal(rate, inverse_largest_eigenvalue(model, GAUSSIAN, x, y))
    quadratic = mlp(4, 3)
    rate = float(inverse_largest_eigenvalue(quadratic, GAUSSIAN, x, y))
    for factor, falls in ((1.9, True), (2.1, False)):  # on a quadratic 2 / λ_max is the border
        model = mlp(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * rate)
        losses = []
        for _ in range(400):
            optimizer.zero_grad()
            loss = GAUSSIAN.nll(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert (losses[-1] < losses[0]) == falls


def test_without_positive_curvature_there_is_no_length() -> None:
    class Falling(ng.Gaussian):
        """Its loss is minus the quadratic error."""

        def losses(self, z: Tensor, y: Tensor) -> Tensor:
            return -super().losses(z, y)

    with pytest.raises(ValueError, match="no positive curvature|no.*positive"):
        inverse_largest_eigenvalue(mlp(4, 3), Falling(), batch(), targets(GAUSSIAN))
