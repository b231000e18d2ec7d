"""`Preconditioned` in a loop under Accelerate: equal to the plain loop, and resumed equal to uninterrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.plain import ACCUMULATE, STEPS, Parts, batches, equal_states, make, plain
from oracles.classifier import LIKELIHOOD, accuracy, blobs
from torch import Tensor, nn

pytest.importorskip("accelerate")
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.utils import ProjectConfiguration  # noqa: E402


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Accelerate keeps its settings in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(accumulate: int, folder: Path | None = None, precision: str = "no") -> tuple[Accelerator, Parts]:
    """Everything that `prepare` hands back; the model is the user's own."""
    project = ProjectConfiguration(project_dir=str(folder) if folder else None, automatic_checkpoint_naming=False)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, project_config=project, mixed_precision=precision
    )
    parts = make()
    model, optimizer, scheduler = accelerator.prepare(parts.model, parts.optimizer, parts.scheduler)
    return accelerator, Parts(model, parts.pre, optimizer, scheduler)


def loop(accelerator: Accelerator, parts: Parts, data: list[tuple[Tensor, Tensor]]) -> None:
    """A loop as Accelerate's documentation writes it, with `observe` in it."""
    for x, y in data:
        with accelerator.accumulate(parts.model):
            z = parts.model(x)
            parts.pre.observe(z)
            accelerator.backward(LIKELIHOOD.nll(z, y))
            parts.optimizer.step()
            parts.scheduler.step()
            parts.optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
def test_equals_the_plain_loop(accumulate: int) -> None:
    expected = plain(accumulate)
    accelerator, parts = prepared(accumulate)
    loop(accelerator, parts, batches(accumulate))
    equal_states(parts.optimizer.state_dict(), expected.optimizer.state_dict())
    assert torch.equal(*(nn.utils.parameters_to_vector(m.parameters()) for m in (parts.model, expected.model)))
    assert parts.pre.stats["steps"] == STEPS and parts.scheduler.get_last_lr() == expected.scheduler.get_last_lr()
    assert accuracy(parts.model, *blobs(600, seed=5)) > 0.9


@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
def test_resumed_equals_uninterrupted(accumulate: int, tmp_path: Path) -> None:
    half = len(batches(accumulate)) // 2
    accelerator, first = prepared(accumulate, tmp_path)
    loop(accelerator, first, batches(accumulate)[:half])
    accelerator.save_state(str(tmp_path / "state"))
    loop(accelerator, first, batches(accumulate)[half:])

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, second = prepared(accumulate, tmp_path)
    accelerator.load_state(str(tmp_path / "state"))
    assert second.pre.due == (STEPS // 2 + 1 in (1, 2, 3, 5) or (STEPS // 2 + 1) % 5 == 0)
    loop(accelerator, second, batches(accumulate)[half:])
    equal_states(second.optimizer.state_dict(), first.optimizer.state_dict())
    assert torch.equal(*(nn.utils.parameters_to_vector(p.model.parameters()) for p in (first, second)))


def test_bf16_autocast_trains() -> None:
    """`prepare` wraps the model's forward in autocast; statistics stay in float32."""
    accelerator, parts = prepared(1, precision="bf16")
    loop(accelerator, parts, batches(1))
    assert {factor.dtype for f in parts.pre._running.factors.values() for factor in (f.A, f.G)} == {torch.float32}
    assert accuracy(parts.model, *blobs(600, seed=5)) > 0.9
    assert parts.pre.stats["skipped"] == parts.pre.stats["bare"] == parts.optimizer.optimizer.skipped == 0
