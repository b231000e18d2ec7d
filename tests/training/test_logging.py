"""What is written, when, and that it is plain numbers."""

import json
from typing import Any

import pytest
import torch
from oracles.classifier import LIKELIHOOD, blobs, mlp

import natgrad as ng
from natgrad.training import StatsLogger


class Written(list):
    """A stand-in for `wandb.log`."""

    def __call__(self, numbers: dict[str, float], step: int) -> None:
        self.append((step, numbers))


def run(steps: int, logger_of: Any, rate: float = 0.1, **settings: Any) -> tuple[ng.Preconditioned, list[float]]:
    model = mlp(20, 16, 8)
    pre = ng.Preconditioner(model, LIKELIHOOD, **settings)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=rate), pre)
    logger = logger_of(optimizer)
    x, y = blobs()
    nus = []
    for rows in (torch.arange(steps * 50) % len(x)).split(50):
        optimizer.zero_grad()
        z = model(x[rows])
        loss = LIKELIHOOD.nll(z, y[rows])
        pre.observe(z)
        loss.backward()
        optimizer.step()
        nus.append(pre.stats["nu"])
        logger.step(loss=loss)
    return optimizer, nus


def test_statistics_and_health_at_their_intervals() -> None:
    out = Written()
    optimizer, nus = run(12, lambda o: StatsLogger(o, out, every=4, health_every=6), scaling=ng.KLClip(1.5))
    assert [step for step, _ in out] == [4, 6, 8, 12]
    for step, numbers in out:
        assert json.loads(json.dumps(numbers)) == numbers and all(type(v) is float for v in numbers.values())
        assert all(name.startswith("natgrad/") for name in numbers)
        if step % 4 == 0:
            clipped = sum(nu < 1 for nu in nus[step - 4 : step]) / 4
            assert numbers["natgrad/clipped"] == pytest.approx(clipped)
            assert numbers["natgrad/nu"] == pytest.approx(nus[step - 1])
            assert numbers["natgrad/lr"] == 0.1 and numbers["natgrad/damping"] == 3e-3 and numbers["natgrad/loss"] > 0
            assert numbers["natgrad/steps"] == step and numbers["natgrad/skipped_steps"] == 0
        assert ("natgrad/layers/0/condition_A" in numbers) == (step % 6 == 0)
    assert len({numbers["natgrad/clipped"] for step, numbers in out if step % 4 == 0}) > 1
    last = out[-1][1]
    for name, layer in ng.health(optimizer).items():
        for key in ("condition_A", "condition_G", "pi", "condition"):
            assert last[f"natgrad/layers/{name}/{key}"] == getattr(layer, key)


def test_damping_by_layer_grafting_and_a_step_left_out() -> None:
    out = Written()
    damping = {"0": 0.01, "2": 0.02}
    optimizer, _ = run(3, lambda o: StatsLogger(o, out, prefix="a/"), damping=damping, scaling=ng.Grafting())
    assert out[-1][1]["a/damping/0"] == 0.01 and out[-1][1]["a/damping/2"] == 0.02
    assert "a/clipped" not in out[-1][1]
    logger = StatsLogger(optimizer, out)
    logger.step()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    count = len(out)
    logger.step()  # the same step still: nothing new to write
    assert optimizer.skipped == 1 and len(out) == count


def test_every_kind_of_optimiser_has_plain_numbers() -> None:
    x, y = blobs(200)
    for make in (ng.KFAC, ng.EigenAdam, ng.NaturalGradient, ng.HessianFree, ng.KrylovDescent, ng.TONGA):
        model = mlp(20, 8, 8)
        optimizer = make(model, LIKELIHOOD)
        out = Written()
        logger = StatsLogger(optimizer, out)
        for k in (1, 2):
            optimizer.step(x, y)
            logger.step()
            assert (
                out[-1][0] == k
                and out[-1][1]["natgrad/loss"] > 0
                and out[-1][1]["natgrad/lr"] == optimizer.param_groups[0]["lr"]
            )


def test_reads_nothing_between_its_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    from natgrad.optim.stats import Stats

    reads: list[str] = []
    monkeypatch.setattr(Stats, "__getitem__", lambda self, name: reads.append(name) or 1.0)
    model = mlp(20, 8, 8)
    pre = ng.Preconditioner(model, LIKELIHOOD)
    logger = StatsLogger(pre, Written(), every=3)
    for k in (1, 2, 3):
        pre.update(blobs(100)[0])
        model(blobs(100)[0]).sum().backward()
        pre.step()
        logger.step()
        assert bool(reads) == (k == 3)


def test_bad_input() -> None:
    pre = ng.Preconditioner(mlp(20, 8, 8), LIKELIHOOD)
    with pytest.raises(TypeError, match="optimizer: expected an optimiser of natgrad"):
        StatsLogger(torch.optim.SGD(pre.view.parameters.values(), lr=0.1), print)
    with pytest.raises(TypeError, match="write: expected"):
        StatsLogger(pre, "runs")
    with pytest.raises(ValueError, match="every=0"):
        StatsLogger(pre, print, every=0)
    with pytest.raises(RuntimeError, match="after optimizer.step"):
        StatsLogger(pre, print).step()
