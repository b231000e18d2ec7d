"""TONGA with the covariance of past batches: the dense discounted mean, whole and cut down to a few directions."""

from typing import Any

import pytest
import torch
from oracles import dense
from oracles.kfac import data, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng

LIKELIHOOD = ng.Gaussian()
BATCHES = [data(LIKELIHOOD, 4, 3, seed=seed) for seed in range(1, 6)]
SIZES = {"full": [43], "layer": [25, 18], "tensor": [20, 5, 15, 3]}


def tonga(model: nn.Module, **settings: Any) -> ng.TONGA:
    return ng.TONGA(model, LIKELIHOOD, **{"lr": 1.0, "momentum": 0.0, "damping": 0.3, **settings})


def covariance(model: nn.Module, x: Tensor, y: Tensor, centered: bool, sizes: list[int]) -> Tensor:
    """Of the gradients of single examples, found in a loop; zero outside of the blocks."""
    R = dense.per_example_gradients(model, x, y, dense.nll("gaussian"))
    R = R - R.mean(0) if centered else R
    return torch.block_diag(*[r.T @ r / len(r) for r in R.split(sizes, 1)])


def leading(C: Tensor, rank: int, sizes: list[int]) -> Tensor:
    """What the ``rank`` largest eigenvalues of every block leave of C."""
    found, start = [], 0
    for size in sizes:
        values, Q = torch.linalg.eigh(C[start : start + size, start : start + size])
        found.append((Q[:, -rank:] * values[-rank:]) @ Q[:, -rank:].T)
        start += size
    return torch.block_diag(*found)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("blocks", SIZES)
def test_steps_are_those_of_the_dense_discounted_mean(blocks: Any, centered: bool) -> None:
    model, gamma, past = mlp(4, 5, 3), 0.8, []
    opt = tonga(model, centered=centered, blocks=blocks, past=ng.PastGradients(rank=60, discount=gamma))
    for x, y in BATCHES:
        past = [gamma * C for C in past] + [covariance(model, x, y, centered, SIZES[blocks])]
        mass = sum(gamma**k for k in range(len(past)))
        C = torch.stack(past).sum(0) / mass
        before = vector(model)
        step = -torch.linalg.solve(C + 0.3 * torch.eye(43, dtype=C.dtype), gradient_of(model, LIKELIHOOD, x, y))
        opt.step(x, y)
        torch.testing.assert_close(vector(model) - before, step)
        assert opt.stats["trace"] == pytest.approx(float(C.trace()))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("blocks", SIZES)
def test_only_the_leading_directions_of_the_past_are_kept(blocks: Any, centered: bool) -> None:
    model, gamma, rank = mlp(4, 5, 3), 0.8, 3
    opt = tonga(model, centered=centered, blocks=blocks, past=ng.PastGradients(rank=rank, discount=gamma))
    kept, mass = torch.zeros(43, 43, dtype=torch.float64), 0.0
    for x, y in BATCHES:
        now = covariance(model, x, y, centered, SIZES[blocks])
        C = (gamma * mass * kept + now) / (gamma * mass + 1)
        before = vector(model)
        step = -torch.linalg.solve(C + 0.3 * torch.eye(43, dtype=C.dtype), gradient_of(model, LIKELIHOOD, x, y))
        opt.step(x, y)
        torch.testing.assert_close(vector(model) - before, step)
        kept, mass = leading(C, rank, SIZES[blocks]), gamma * mass + 1
    state = opt.state_dict()["state"]
    assert all(sum(name.startswith("past_") for name in entry) == rank for entry in state.values())


def test_the_covariance_of_some_examples_and_the_gradient_of_all() -> None:
    model, steps = mlp(4, 5, 3), []
    generator = torch.Generator().manual_seed(7)
    opt = tonga(model, centered=True, gradients=5, seed=7, past=ng.PastGradients(rank=10, discount=0.5))
    past = torch.zeros(43, 43, dtype=torch.float64)
    for k, (x, y) in enumerate(BATCHES[:2]):
        chosen = torch.randperm(12, generator=generator)[:5].sort().values
        now = covariance(model, x[chosen], y[chosen], True, [43])
        C = now if k == 0 else (0.5 * past + now) / 1.5
        before = vector(model)
        steps.append(-torch.linalg.solve(C + 0.3 * torch.eye(43, dtype=C.dtype), gradient_of(model, LIKELIHOOD, x, y)))
        opt.step(x, y)
        torch.testing.assert_close(vector(model) - before, steps[-1])
        past = C


@pytest.mark.parametrize("damping", [None, 0.3])
def test_a_past_that_is_forgotten_at_once_changes_nothing(damping: float | None) -> None:
    found = []
    for past in (None, ng.PastGradients(rank=4, discount=0.0)):
        model = mlp(4, 5, 3)
        opt = tonga(model, damping=damping, past=past)
        for x, y in BATCHES:
            opt.step(x, y)
        found.append(vector(model))
    torch.testing.assert_close(found[1], found[0])


def test_convolutions_take_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x, y = torch.randn(6, 1, 3, 3, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    opt = tonga(model, past=ng.PastGradients(rank=12, discount=0.5))
    first = covariance(model, x, y, False, [28])
    opt.step(x, y)
    C, before = (0.5 * first + covariance(model, x, y, False, [28])) / 1.5, vector(model)
    step = -torch.linalg.solve(C + 0.3 * torch.eye(28, dtype=C.dtype), gradient_of(model, LIKELIHOOD, x, y))
    opt.step(x, y)
    torch.testing.assert_close(vector(model) - before, step)


class _TwoPrecisions(nn.Module):
    """A layer in single precision, the rest in double."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.LayerNorm(2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.tanh(self.first(x.to(self.first.weight.dtype))).double()))


@pytest.mark.parametrize("past", [None, ng.PastGradients(rank=4)])
@pytest.mark.parametrize("gradients", [None, 5])
@pytest.mark.parametrize("centered", [True, False])
def test_parameters_of_two_precisions(gradients: int | None, past: ng.PastGradients | None, centered: bool) -> None:
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    steps = []
    for model in (_TwoPrecisions(), _TwoPrecisions().double()):
        before = vector(model)
        opt = tonga(model, gradients=gradients, past=past, centered=centered)
        for _ in range(3):
            opt.step(x, y)
        steps.append(vector(model) - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"discount": 1.0}, {"discount": -0.1}, {"discount": float("nan")}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ng.PastGradients(**settings)  # type: ignore[bad-argument-type]
