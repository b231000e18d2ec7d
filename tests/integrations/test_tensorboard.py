"""`StatsLogger` with a real SummaryWriter: what the event file holds."""

from pathlib import Path

import pytest
import torch
from oracles.classifier import LIKELIHOOD, blobs, mlp

import natgrad as ng

pytest.importorskip("tensorboard")


@pytest.mark.filterwarnings("ignore")
def test_events_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = mlp(20, 16, 8, dtype=torch.float64)
    pre = ng.Preconditioner(model, LIKELIHOOD)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.1), pre)
    x, y = blobs()
    expected = []
    with SummaryWriter(str(tmp_path)) as writer:
        logger = ng.training.StatsLogger(optimizer, writer, every=2, health_every=4)
        for rows in torch.arange(400).split(50):
            optimizer.zero_grad()
            z = model(x[rows].double())
            loss = LIKELIHOOD.nll(z, y[rows])
            pre.observe(z)
            loss.backward()
            optimizer.step()
            logger.step(loss=loss)
            expected.append((float(loss), pre.stats["nu"]))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert list(found["natgrad/loss"]) == [2, 4, 6, 8] and list(found["natgrad/layers/0/pi"]) == [4, 8]
    for step in (2, 4, 6, 8):
        assert found["natgrad/loss"][step] == pytest.approx(expected[step - 1][0], rel=1e-6)
        assert found["natgrad/nu"][step] == pytest.approx(expected[step - 1][1], rel=1e-6)
    for name, factors in pre._running.factors.items():
        for key, factor in (("A", factors.A), ("G", factors.G)):
            dense = factor if isinstance(factor, torch.Tensor) else factor.to_dense()
            there = float(torch.linalg.cond(dense))
            own = found[f"natgrad/layers/{name}/condition_{key}"][8]
            # The logits' G is singular: their derivatives add up to 0.
            assert own == pytest.approx(there, rel=1e-4) if there < 1e12 else own == float("inf")
