"""Updated backpropagation: the two orders of accuracy, and the sweep against one written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, mlp, targets
from torch import Tensor, nn

import natgrad as ng
from natgrad.optim.backprop_update import UpdatedBackprop, updated_signal

N, IN, OUT = 6, 4, 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


h, W, b, top = draw(N, IN, seed=0), draw(OUT, IN, seed=1), draw(OUT, seed=2), draw(3, OUT, seed=3)
DW, DB, y = draw(OUT, IN, seed=4), draw(OUT, seed=5), draw(N, 3, seed=6)


def loss_above(f: Tensor) -> Tensor:
    """A loss of the layer's output that is curved in several directions at once."""
    return (torch.sin(f @ top.T) - y).square().sum()


def exact(activation: Any, t: float) -> Tensor:
    leaf = h.clone().requires_grad_()
    return torch.autograd.grad(loss_above(activation(leaf @ (W + t * DW).T + b + t * DB)), leaf)[0]


def approximate(activation: Any, t: float, curvature: bool = True, bend: bool = False) -> Tensor:
    a = (h @ W.T + b).requires_grad_()
    f = activation(a)
    (slope,) = torch.autograd.grad(f.sum(), a, create_graph=True)
    second = torch.autograd.grad(slope.sum(), a)[0] if slope.requires_grad else torch.zeros_like(a)
    leaf = f.detach().requires_grad_()
    (score,) = torch.autograd.grad(loss_above(leaf), leaf, create_graph=True)

    def product(u: Tensor) -> Tensor:
        return torch.autograd.grad(score, leaf, u, retain_graph=True)[0]

    da = t * (h @ DW.T + DB)
    given = (product if curvature else None, second.detach() if bend else None)
    return updated_signal(W, slope.detach(), score.detach(), t * DW, da, *given)


def order(activation: Any, **terms: bool) -> float:
    """log₂ of how much the error shrinks when the move is halved."""
    small, smaller = 1e-4, 5e-5
    errors = [(approximate(activation, t, **terms) - exact(activation, t)).norm() for t in (small, smaller)]
    return float(torch.log2(errors[0] / errors[1]))


def test_first_order_accuracy_for_a_curved_unit_and_second_for_a_piecewise_linear_one() -> None:
    assert (h @ W.T + b).abs().min() > 1e-2  # away from the kinks
    assert order(torch.tanh) == pytest.approx(1.0, abs=0.02)
    assert order(torch.relu) == pytest.approx(2.0, abs=0.02)
    assert order(torch.tanh, bend=True) == pytest.approx(2.0, abs=0.02)
    assert order(torch.relu, curvature=False) == pytest.approx(1.0, abs=0.02)


def test_without_the_zeroth_order_term_nothing_would_be_left() -> None:
    """What the thesis prints vanishes with the move; the signal does not."""
    still = approximate(torch.tanh, 0.0)
    torch.testing.assert_close(still, exact(torch.tanh, 0.0), rtol=1e-12, atol=1e-12)
    assert still.norm() > 1


@pytest.mark.parametrize("likelihood", [ng.Gaussian(), ng.Categorical()], ids=repr)
@pytest.mark.parametrize("unit", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_without_correction_it_is_gradient_descent(likelihood: Any, unit: type[nn.Module]) -> None:
    model, twin = mlp(4, 5, 4, 3, activation=unit), mlp(4, 5, 4, 3, activation=unit)
    x, t = batch(), targets(likelihood)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
    loss = likelihood.nll(twin(x), t)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(UpdatedBackprop(model, likelihood, lr=0.3, correction="none").step(x, t), loss.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def descend(layer: nn.Module, loss: Callable[[], Tensor], lr: float) -> None:
    """One gradient step of a layer alone."""
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= lr * g


@pytest.mark.parametrize(("correction", "expected"), [("none", 1), ("weights", 1), ("printed", 1), ("full", 2)])
def test_the_sweep_approaches_descent_on_layers_that_have_moved(correction: Any, expected: int) -> None:
    """Layer by layer, each by the exact gradient after the layers above it moved: two layers, so one correction.

    ``expected`` is the order in lr of the difference of the bottom layer's update from that, over lr.
    """
    x, t = batch() + 0.3, targets(ng.Gaussian())

    def bottom(lr: float, kind: Any) -> Tensor:
        model = mlp(4, 5, 3, 3)
        before = model[2].weight.detach().clone()
        UpdatedBackprop(model, ng.Gaussian(), lr=lr, correction=kind).step(x, t)
        return (before - model[2].weight.detach()) / lr

    def wanted(lr: float) -> Tensor:
        model = mlp(4, 5, 3, 3)
        descend(model[4], lambda: ng.Gaussian().nll(model(x), t), lr)
        return torch.autograd.grad(ng.Gaussian().nll(model(x), t), model[2].weight)[0]

    errors = [float((bottom(lr, correction) - wanted(lr)).norm()) for lr in (1e-3, 5e-4)]
    # The layer that sends the signal is linear, so that its f'' is zero: "printed" has all terms too.
    order = 2 if correction == "printed" else expected
    assert torch.log2(torch.tensor(errors[0] / errors[1])) == pytest.approx(order, abs=0.05)


def test_three_layers_need_the_second_derivative_of_the_hidden_one() -> None:
    x, t = batch() + 0.3, targets(ng.Gaussian())

    def error(correction: Any, lr: float) -> float:
        model, twin = mlp(4, 5, 4, 3), mlp(4, 5, 4, 3)
        before = model[0].weight.detach().clone()
        UpdatedBackprop(model, ng.Gaussian(), lr=lr, correction=correction).step(x, t)
        for index in (4, 2):  # exactly: every layer on the loss of the layers that moved
            descend(twin[index], lambda: ng.Gaussian().nll(twin(x), t), lr)
        wanted = torch.autograd.grad(ng.Gaussian().nll(twin(x), t), twin[0].weight)[0]
        return float(((before - model[0].weight.detach()) / lr - wanted).norm())

    orders = {
        kind: float(torch.log2(torch.tensor(error(kind, 1e-3) / error(kind, 5e-4)))) for kind in ("printed", "full")
    }
    assert orders["printed"] == pytest.approx(1.0, abs=0.05) and orders["full"] == pytest.approx(2.0, abs=0.05)
    assert error("full", 1e-3) < 0.1 * error("none", 1e-3)


def test_state_bad_batches_and_refusals() -> None:
    model, x, t = mlp(4, 5, 3), batch(), targets(ng.Gaussian())
    optimizer = UpdatedBackprop(model, ng.Gaussian(), lr=0.1)
    optimizer.step(x, t)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(torch.where(x > 1, torch.nan, x), t)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.stats["skipped"] == 1 and optimizer.stats["updates"] == 2
    again = UpdatedBackprop(mlp(4, 5, 3), ng.Gaussian(), lr=0.5)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.1 and again.param_groups[0]["skipped"] == 1
    with pytest.raises(ValueError, match="correction='some'"):
        UpdatedBackprop(model, ng.Gaussian(), correction="some")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=r"model: Sequential is not an nn\.Sequential of trained"):
        UpdatedBackprop(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), ng.Gaussian())
    with pytest.raises(TypeError, match="takes no closure"):
        optimizer.step(closure=lambda: None)
