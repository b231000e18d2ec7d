"""`Preconditioned` under Hugging Face's Trainer: equal to the plain loop, and resumed equal to uninterrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.plain import ACCUMULATE, BATCH, STEPS, Parts, equal_states, make, plain
from oracles.classifier import LIKELIHOOD, accuracy, blobs, mlp
from torch import Tensor, nn

import natgrad as ng

pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    """A module that speaks Trainer's language."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(20, 32, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


class Loss:
    """`compute_loss_func`: the place for `observe`. Keeps the batches that training saw."""

    def __init__(self, pre: ng.Preconditioner) -> None:
        self.pre = pre
        self.seen: list[Tensor] = []

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        z = outputs["logits"]
        if z.requires_grad:  # evaluation computes the loss without a graph
            self.pre.observe(z)
            self.seen.append(labels)
        loss = LIKELIHOOD.nll(z, labels)
        # With gradient accumulation Trainer wants the micro-batch's share of the loss over all of them.
        return loss if num_items_in_batch is None else loss * len(labels) / num_items_in_batch


class StopAt(TrainerCallback):
    """Saves and stops after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def data() -> list[dict[str, Tensor]]:
    x, y = blobs()
    return [{"x": a, "labels": torch.tensor([int(b), i])} for i, (a, b) in enumerate(zip(x, y, strict=True))]


class NumberedLoss(Loss):
    """Labels are (class, number of the example), so that the order of the examples is known afterwards."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        numbers, classes = labels[:, 1], labels[:, 0]
        items = None if num_items_in_batch is None else num_items_in_batch / 2  # Trainer counts every label
        loss = super().__call__(outputs, classes, items)
        if torch.is_grad_enabled():
            self.seen[-1] = numbers
        return loss


def trainer(folder: Path, accumulate: int, callbacks: Any = (), **settings: Any) -> tuple[Trainer, Parts, NumberedLoss]:
    """A fresh one."""
    model = Model()
    parts = make(model)
    loss = NumberedLoss(parts.pre)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // accumulate,
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=50,
        max_grad_norm=0.0,  # no clipping
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=data(),
        eval_dataset=data()[:100],
        compute_loss_func=loss,
        optimizers=(parts.optimizer, parts.scheduler),
        callbacks=list(callbacks),
    )
    return made, parts, loss


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters())


@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
def test_equals_the_plain_loop(accumulate: int, tmp_path: Path) -> None:
    made, parts, loss = trainer(tmp_path, accumulate)
    made.train()
    x, y = blobs()
    expected = plain(accumulate, [(x[rows], y[rows]) for rows in loss.seen])
    assert len(loss.seen) == STEPS * accumulate and parts.pre.stats["steps"] == STEPS
    torch.testing.assert_close(vector(parts.model), vector(expected.model), rtol=1e-5, atol=1e-6)
    assert made.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]
    assert accuracy(parts.model.net, *blobs(600, seed=5)) > 0.9
    with torch.no_grad():
        there = float(LIKELIHOOD.nll(parts.model.net(x[:100]), y[:100]))
    assert made.evaluate()["eval_loss"] == pytest.approx(there, rel=1e-4)  # without a graph: nothing to observe


@pytest.mark.parametrize("accumulate", [1, ACCUMULATE])
def test_resumed_equals_uninterrupted(accumulate: int, tmp_path: Path) -> None:
    whole, expected, _ = trainer(tmp_path / "whole", accumulate)
    whole.train()
    half = STEPS // 2
    first, _, _ = trainer(tmp_path, accumulate, [StopAt(half)])
    first.train()
    second, found, _ = trainer(tmp_path, accumulate)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{half}"))
    assert second.state.global_step == found.pre.stats["steps"] == STEPS
    assert torch.equal(vector(found.model), vector(expected.model))
    equal_states(found.optimizer.state_dict(), expected.optimizer.state_dict())


def test_a_bert_trains_and_is_covered(tmp_path: Path) -> None:
    """A model of transformers, randomly initialised: says whether a token stands before another one."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    tokens = torch.randint(20, (512, 8), generator=torch.Generator().manual_seed(1))
    labels = (tokens[:, 0] > tokens[:, 1]).long()
    pre = ng.Preconditioner(model, LIKELIHOOD, forward=lambda module, batch: module(**batch).logits)
    assert pre.coverage().uncovered == ()
    optimizer = ng.Preconditioned(torch.optim.AdamW(model.parameters(), lr=3e-3), pre)
    loss = Loss(pre)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=64, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    Trainer(
        model=model, args=arguments, train_dataset=rows, compute_loss_func=loss, optimizers=(optimizer, None)
    ).train()
    with torch.no_grad():
        z = model.eval()(input_ids=tokens).logits
    assert (z.argmax(1) == labels).float().mean() > 0.9
    assert pre.stats["bare"] == pre.stats["skipped"] == optimizer.skipped == 0
