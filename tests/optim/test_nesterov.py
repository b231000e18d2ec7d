"""NesterovSGD against the two-line loop of Sutskever et al. (2013)."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from natgrad import NesterovSGD
from natgrad.optim.nesterov import momentum_schedule

H = torch.tensor([[3.0, 0.5], [0.5, 0.2]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0], dtype=torch.float64)


def gradient(x: Tensor) -> Tensor:
    return H @ x - B + 0.1 * torch.sin(x)


def by_hand(steps: int, lr, mu_max) -> tuple[Tensor, Tensor]:
    """(θ, look-ahead point) after `steps` updates of v = mu v - lr grad(θ + mu v), θ += v."""
    theta, v, mu = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.0
    for t in range(steps):
        v = mu * v - lr(t) * gradient(theta + mu * v)
        theta = theta + v
        mu = min(1 - 2 ** (-1 - math.log2((t + 1) // 250 + 1)), mu_max(t))
    return theta, theta + mu * v


def run(steps: int, lr, mu_max) -> tuple[nn.Parameter, NesterovSGD]:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = NesterovSGD([x], lr=lr(0), mu_max=mu_max(0))
    for t in range(steps):
        (group,) = optimizer.param_groups
        group["lr"], group["mu_max"] = lr(t), mu_max(t)
        x.grad = gradient(x.detach())
        optimizer.step()
    return x, optimizer


def test_schedule() -> None:
    assert [momentum_schedule(t, 0.99) for t in (0, 249, 250, 500, 750)] == [0.5, 0.5, 0.75, 1 - 1 / 6, 0.875]
    for t in (0, 249, 250, 1999, 12250):
        assert momentum_schedule(t, 0.995) == pytest.approx(1 - 2 ** (-1 - math.log2(t // 250 + 1)), abs=1e-15)
    assert momentum_schedule(10**6, 0.9) == 0.9


@pytest.mark.parametrize("steps", [1, 2, 250, 251, 252, 1100])
@pytest.mark.parametrize(
    ("lr", "mu_max"),
    [
        (lambda t: 0.01, lambda t: 0.99),
        (lambda t: 0.01, lambda t: 0.0),
        (lambda t: 0.02 * min(1.0, t / 100), lambda t: 0.99),  # warm-up from zero
        (lambda t: 0.02 * (1 + math.cos(t / 30)) * (t % 7 != 3), lambda t: 0.8),  # zero now and then
        (lambda t: 0.01, lambda t: 0.99 if t < 600 else 0.5),  # lowered, as the authors do at the end
        (lambda t: 0.01, lambda t: 0.9 if t < 600 or t > 700 else 0.0),
    ],
    ids=["constant", "no momentum", "warm-up", "zero lr", "lower mu", "mu off and on"],
)
def test_equals_the_loop_of_the_paper(steps: int, lr, mu_max) -> None:
    x, _ = run(steps, lr, mu_max)
    _, lookahead = by_hand(steps, lr, mu_max)
    torch.testing.assert_close(x.detach(), lookahead, rtol=1e-11, atol=1e-13)


def test_equals_torch_while_the_momentum_is_constant() -> None:
    model = nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = NesterovSGD(model.parameters(), lr=0.1, mu_max=0.3)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.3, nesterov=True)
    data = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        for m, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            m(data).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.bias, twin.bias, rtol=1e-6, atol=1e-7)


def test_state_dict_continues_bit_for_bit() -> None:
    def lr(t: int) -> float:
        return 0.01 / (1 + t / 50)

    x, _ = run(400, lr, lambda t: 0.99)
    y, before = run(247, lr, lambda t: 0.99)
    again = nn.Parameter(y.detach().clone())
    optimizer = NesterovSGD([again], lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    for t in range(247, 400):
        optimizer.param_groups[0]["lr"] = lr(t)
        again.grad = gradient(again.detach())
        optimizer.step()
    assert torch.equal(again, x)


def test_lr_scheduler_and_closure() -> None:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = NesterovSGD([x], lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ H @ x - B @ x - 0.1 * torch.cos(x).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(300):
        losses.append(float(optimizer.step(closure)))
        scheduler.step()
    _, lookahead = by_hand(300, lambda t: 0.05 * 0.5 ** (t // 100), lambda t: 0.99)
    torch.testing.assert_close(x.detach(), lookahead, rtol=1e-10, atol=1e-12)
    assert losses[0] == pytest.approx(-0.2) and losses[-1] < losses[0] - 1.0


def test_a_parameter_without_gradient_keeps_its_velocity() -> None:
    x, y = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = NesterovSGD([x, y], lr=0.01)
    for p in (x, y):
        p.grad = gradient(p.detach())
    optimizer.step()
    v = -0.01 * optimizer.state[y]["momentum_buffer"]
    before, y.grad = y.detach().clone(), None
    optimizer.param_groups[0]["lr"] = 0.002
    x.grad = gradient(x.detach())
    optimizer.step()
    assert torch.equal(y, before)
    torch.testing.assert_close(-0.002 * optimizer.state[y]["momentum_buffer"], v, rtol=1e-12, atol=0.0)


def test_groups_have_their_own_settings() -> None:
    x, y = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = NesterovSGD([{"params": [x], "lr": 0.02}, {"params": [y], "mu_max": 0.6}], lr=0.01)
    for _ in range(300):
        for p in (x, y):
            p.grad = gradient(p.detach())
        optimizer.step()
    for p, lr, mu_max in ((x, 0.02, 0.99), (y, 0.01, 0.6)):
        _, lookahead = by_hand(300, lambda t, lr=lr: lr, lambda t, mu_max=mu_max: mu_max)
        torch.testing.assert_close(p.detach(), lookahead, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": 0.1, "mu_max": 1.0}, "mu_max is 1.0"),
        ({"lr": 0.1, "mu_max": -0.1}, "mu_max is -0.1"),
    ],
)
def test_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NesterovSGD([nn.Parameter(torch.zeros(1))], **arguments)


def test_refuses_a_bad_group_and_sparse_gradients() -> None:
    with pytest.raises(ValueError, match="lr is -1.0"):
        NesterovSGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": -1.0}], lr=0.1)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        NesterovSGD(embedding.parameters(), lr=0.1).step()
