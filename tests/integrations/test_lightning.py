"""`Preconditioned` under Lightning's Trainer: equal to the plain loop, and resumed equal to uninterrupted."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.plain import ACCUMULATE, STEPS, Parts, batches, equal_states, make, plain
from oracles.classifier import LIKELIHOOD, accuracy, blobs, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader

L = pytest.importorskip("lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(L.LightningModule):
    """As a user writes it: `observe` stands in training_step, the optimiser in configure_optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(20, 32, 8)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        self.parts.pre.observe(z)
        loss = LIKELIHOOD.nll(z, y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        self.parts = make(self.net)
        schedule = {"scheduler": self.parts.scheduler, "interval": "step"}
        return {"optimizer": self.parts.optimizer, "lr_scheduler": schedule}


def fit(
    folder: Path, accumulate: int, epochs: int = 2, resume: Path | None = None, **settings: Any
) -> tuple[Classifier, L.Trainer]:
    """An epoch is half of the steps."""
    module = Classifier()
    data = batches(accumulate)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(data[: len(data) // 2], batch_size=None), ckpt_path=resume)  # type: ignore[arg-type]
    return module, trainer


def reference(accumulate: int) -> Parts:
    """The plain loop over the same two epochs."""
    data = batches(accumulate)
    return plain(accumulate, data[: len(data) // 2] * 2)


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
def test_equals_the_plain_loop(accumulate: int, tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, accumulate)
    expected = reference(accumulate)
    assert trainer.global_step == module.parts.pre.stats["steps"] == STEPS
    assert torch.equal(vector(module.net), vector(expected.model))
    equal_states(module.parts.optimizer.state_dict(), expected.optimizer.state_dict())
    assert accuracy(module.net, *blobs(600, seed=5)) > 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
def test_resumed_equals_uninterrupted(accumulate: int, tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, accumulate)
    _, trainer = fit(tmp_path, accumulate, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, trainer = fit(tmp_path, accumulate, resume=tmp_path / "half.ckpt")
    assert trainer.global_step == STEPS
    assert torch.equal(vector(second.net), vector(whole.net))
    equal_states(second.parts.optimizer.state_dict(), whole.parts.optimizer.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_bf16_and_clipping(tmp_path: Path) -> None:
    """Lightning clips in the closure, so before the gradient is preconditioned."""
    module, _ = fit(tmp_path, 1, precision="bf16-mixed", gradient_clip_val=1.0)
    assert {f.A.dtype for f in module.parts.pre._running.factors.values()} == {torch.float32}
    assert accuracy(module.net, *blobs(600, seed=5)) > 0.9
    assert module.parts.optimizer.skipped == module.parts.pre.stats["skipped"] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_step_without_observe_says_what_is_missing(tmp_path: Path) -> None:
    class Forgetful(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return LIKELIHOOD.nll(self.net(batch[0]), batch[1])

    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"call observe\(z\) before loss.backward"):
        trainer.fit(Forgetful(), DataLoader(batches(1), batch_size=None))  # type: ignore[arg-type]
