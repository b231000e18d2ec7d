"""Factors from some of the positions of every example."""

from typing import Any

import pytest
import torch
from oracles.layers import draw
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import Factors, factors_from, to_dense

LIKELIHOOD = ng.Gaussian()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].tanh().mean(1)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv 1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Flatten()), (4, 2, 8)),
    "conv 2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten()), (4, 2, 5, 8)),
    "no bias, stride": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2, 2, bias=False), nn.Flatten()), (4, 2, 6, 10)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()), (4, 4, 5, 6)),
    "narrow": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten()), (4, 2, 4, 2)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Flatten()), (4, 2, 2, 3)),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (4, 9, 3)),
    "attention": (Attention, (4, 6, 4)),
    "recurrent": (lambda: _First(nn.GRU(3, 2, batch_first=True)), (4, 5, 3)),
}


class _First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    return make().double(), draw(*size)


def estimates(model: nn.Module, x: Tensor, positions: float, steps: int, **settings: Any) -> list[dict[str, Factors]]:
    """The factors of so many estimates of one batch."""
    periods = ng.Renewal(10, (), 5, positions=positions)
    pre = ng.Preconditioner(model, LIKELIHOOD, expectation="exact", periods=periods, **settings)
    found = []
    for k in range(steps):
        pre._steps = 5 * (k + 1) - 1
        z = model(x)
        pre.observe(z)
        statistics = pre._pending.take(torch.device("cpu"), 1)
        assert statistics is not None
        found.append(factors_from(statistics))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_average_over_estimates_is_the_factor_of_all_positions(name: str) -> None:
    model, x = made(name)
    (whole,) = estimates(model, x, 1.0, 1)
    for every in (2, 4):
        parts = estimates(model, x, 1 / every, 4)
        for layer, factors in whole.items():
            mean = torch.stack([to_dense(part[layer].A) for part in parts]).mean(0)
            torch.testing.assert_close(mean, to_dense(factors.A))
            for part in parts:
                torch.testing.assert_close(to_dense(part[layer].G), to_dense(factors.G))
                assert torch.linalg.eigvalsh(to_dense(part[layer].A)).min() > -1e-10


@pytest.mark.parametrize("name", ["conv 2d", "sequence", "attention"])
def test_every_second_position_counts_twice(name: str) -> None:
    """A as the rows of the definition have it, not of all of them."""
    model, x = made(name)
    (whole,), (half, other) = estimates(model, x, 1.0, 1), estimates(model, x, 0.5, 2)
    for layer, factors in whole.items():
        A, B, C = (to_dense(found[layer].A) for found in (whole, half, other))
        assert not torch.allclose(A, B) and not torch.allclose(B, C) and factors.A.shape == B.shape
    if name == "sequence":
        a = torch.cat([x[:, 1::2], torch.ones(4, 4, 1, dtype=x.dtype)], 2).flatten(0, 1)
        torch.testing.assert_close(half["0"].A, 2 * a.T @ a / 4)


@pytest.mark.parametrize("route", ["update", "empirical", "input_covariance", "two micro-batches"])
def test_every_way_to_observe_takes_the_same_positions(route: str) -> None:
    model, x = made("sequence" if route == "input_covariance" else "conv 2d")
    expected = estimates(model, x, 0.5, 1)[0]["0"].A
    structure = "input_covariance" if route == "input_covariance" else "block_diagonal"
    expectation = "empirical" if route == "empirical" else "exact"
    periods = ng.Renewal(10, (), 5, positions=0.5)
    pre = ng.Preconditioner(model, LIKELIHOOD, structure=structure, expectation=expectation, periods=periods)
    pre._steps = 4
    y = draw(*model(x).shape, seed=1)
    if route == "update":
        pre.update(x)
    else:
        for part in range(2) if route == "two micro-batches" else (None,):
            some = slice(None) if part is None else slice(2 * part, 2 * part + 2)
            z = model(x[some])
            pre.observe(z, y[some])
            LIKELIHOOD.nll(z, y[some]).backward()
    statistics = pre._pending.take(torch.device("cpu"), 5)
    assert statistics is not None
    torch.testing.assert_close(to_dense(factors_from(statistics)["0"].A), expected)


def test_reduced_positions_and_eigenbases_are_not_thinned() -> None:
    model, x = made("sequence")
    (whole,), (part,) = (estimates(model, x, p, 1, sharing="reduce") for p in (1.0, 0.25))
    for name, factors in whole.items():
        torch.testing.assert_close(part[name].A, factors.A)
    found, state = [], None
    for positions in (1.0, 0.5):
        periods = ng.Renewal(1, (), 1, positions=positions)
        pre = ng.Preconditioner(model, LIKELIHOOD, structure="ekfac", expectation="exact", periods=periods)
        model.zero_grad()
        if state is None:
            z = model(x)
            pre.observe(z)
            z.sum().backward()
            pre.step()
            state = pre.state_dict()
        else:
            pre.load_state_dict(state)
        pre.observe(model(x))
        statistics = pre._pending.take(torch.device("cpu"), 2)
        assert statistics is not None
        found.append(factors_from(statistics))
    for name, factors in found[0].items():
        torch.testing.assert_close(found[1][name].S, factors.S)
        assert not torch.allclose(to_dense(found[1][name].A), to_dense(factors.A))


def test_the_setting_is_printed_and_checked() -> None:
    model, _ = made("sequence")
    pre = ng.Preconditioner(model, LIKELIHOOD, periods=ng.Renewal(rows=0.5, positions=0.25))
    assert str(pre.coverage()).endswith("factors from 0.5 of the examples and, of A, 0.25 of the positions")
    assert "positions=0.25" in repr(pre.periods) and "rows=0.5" in repr(pre.periods)
    x = draw(4, 9, 3)
    pre.update(x)
    model(x).sum().backward()
    pre.step()
    assert pre.stats["rows"] == 0.5 and pre.stats["positions"] == 0.25
    assert not ng.Preconditioner(model, LIKELIHOOD).coverage().notes
    for bad in (0.0, -1.0, 0.3, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"positions=.*one over a whole number"):
            ng.Renewal(positions=bad)
