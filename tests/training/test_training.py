"""Batch-size schedule, iterate averaging and sparse initialisation, against the formulas of the papers."""

import copy
import math

import pytest
import torch
from torch import nn

from natgrad.training import ExponentialBatchSize, IterateAverage, sparse_init_


def test_batch_sizes_of_the_paper() -> None:
    m = ExponentialBatchSize(start=1000, final=60000, at=500)
    b = 499 / math.log(60)
    for k in (1, 2, 17, 250, 499):
        assert m(k) == round(1000 * math.exp((k - 1) / b))
    assert (m(1), m(500), m(501), m(10**6)) == (1000, 60000, 60000, 60000)
    assert m(499) < 60000
    assert all(m(k) <= m(k + 1) for k in range(1, 510))


def test_batch_size_corner_cases() -> None:
    assert [ExponentialBatchSize(10, 30, at=1)(k) for k in (1, 2)] == [30, 30]
    assert [ExponentialBatchSize(10, 30, at=2)(k) for k in (1, 2, 3)] == [10, 30, 30]
    assert {ExponentialBatchSize(30, 30)(k) for k in (1, 100, 600)} == {30}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 10, 5), "start is 0"), ((1, 0, 5), "final is 0"), ((1, 10, 0), "at is 0"), ((11, 10, 5), r"start \(11\)")],
)
def test_batch_size_refuses(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExponentialBatchSize(*arguments)
    with pytest.raises(ValueError, match="counted from 1"):
        ExponentialBatchSize(1, 2)(0)


def test_average_is_the_formula() -> None:
    model = nn.Linear(3, 2).double()
    initial = model.weight.detach().clone()
    average = IterateAverage(model, xi=0.8)
    assert torch.equal(average.module.weight, initial)
    expected = torch.zeros_like(initial)
    iterates = []
    for k in range(1, 13):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, dtype=torch.float64))
        iterates.append(model.weight.detach().clone())
        average.update_parameters(model)
        xi = min(1 - 1 / k, 0.8)
        expected = xi * expected + (1 - xi) * iterates[-1]
        torch.testing.assert_close(average.module.weight.detach(), expected, rtol=1e-13, atol=1e-14)
        if k <= 5:  # the plain mean while 1 - 1/k <= xi
            torch.testing.assert_close(expected, torch.stack(iterates).mean(0))


def test_average_state_copies_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model(torch.randn(8, 3)).sum().backward()
    average = IterateAverage(model)
    assert all(p.grad is None for p in average.module.parameters())
    assert all(p.grad is not None for p in model.parameters())

    def change(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        model(torch.randn(8, 3, generator=generator))

    for seed in range(3):
        change(seed)
        average.update_parameters(model)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)
    resumed = IterateAverage(copy.deepcopy(model))
    resumed.load_state_dict(average.state_dict())
    copied = copy.deepcopy(average)
    change(3)
    for a in (average, resumed, copied):
        a.update_parameters(model)
    for a in (resumed, copied):
        assert int(a.n_averaged) == 4
        for p, q in zip(a.parameters(), average.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("xi", [1.0, -0.1, math.nan])
def test_average_refuses(xi: float) -> None:
    with pytest.raises(ValueError, match="xi is"):
        IterateAverage(nn.Linear(1, 1), xi=xi)


def test_sparse_initialisation() -> None:
    model = nn.Sequential(nn.Linear(200, 400), nn.Tanh(), nn.Linear(400, 6, bias=False), nn.Linear(6, 50))
    assert sparse_init_(model, std=0.25, bias=0.5, generator=torch.Generator().manual_seed(0)) is model
    for layer, k in ((model[0], 15), (model[2], 15), (model[3], 6)):
        assert torch.equal((layer.weight != 0).sum(dim=1), torch.full((layer.out_features,), k))
    entries = model[0].weight[model[0].weight != 0].detach()  # 6000 draws: standard errors 0.0032 and 0.0023
    assert abs(float(entries.mean())) < 0.012
    assert float(entries.std()) == pytest.approx(0.25, abs=0.009)
    assert torch.equal(model[0].bias, torch.full((400,), 0.5))
    uses = (model[0].weight != 0).sum(dim=0).double()  # each input is chosen 400 · 15 / 200 = 30 times on average
    assert float(uses.mean()) == 30.0 and 10 <= uses.min() and uses.max() <= 55


def test_sparse_initialisation_is_reproducible_in_any_dtype_and_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    weights = [
        sparse_init_(nn.Linear(20, 10, dtype=dtype, device="cpu"), k=4, generator=torch.Generator().manual_seed(3))
        for dtype in (torch.float64, torch.float32)
    ]
    torch.set_rng_state(before)
    sparse_init_(weights[0], k=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0].weight.float(), weights[1].weight)


def test_sparse_initialisation_refuses() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        sparse_init_(nn.Linear(2, 2), k=0)
    with pytest.raises(ValueError, match="std is -1"):
        sparse_init_(nn.Linear(2, 2), std=-1.0)
    with pytest.raises(ValueError, match="ReLU has no nn.Linear"):
        sparse_init_(nn.ReLU())
