"""Muon and SOAP as entries of a race: what they update, and that a checkpoint carries on."""

import copy
import io
from typing import Any

import pytest
import torch
from lab.tiny import tiny_task

from natgrad_lab import optimizers, rivals
from natgrad_lab.runner import Runner


def vector(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_muon_takes_the_matrices_and_adamw_the_biases() -> None:
    task = tiny_task()
    model = task.make_model()
    twin = copy.deepcopy(model)
    entry = optimizers.make("muon", task, model, settings={"lr": 0.01})
    biases = torch.optim.AdamW([p for p in twin.parameters() if p.ndim == 1], lr=0.01, weight_decay=0.0)
    matrices = torch.optim.Muon(
        [p for p in twin.parameters() if p.ndim == 2], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        loss = entry.step(task.x_train[:40], task.y_train[:40])
        twin.zero_grad()
        expected = task.likelihood.nll(twin(task.x_train[:40]), task.y_train[:40])
        expected.backward()
        biases.step()
        matrices.step()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(vector(model), vector(twin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_resumed_run_is_an_uninterrupted_one(name: str) -> None:
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    task = tiny_task()
    settings = {"precondition_frequency": 2} if name == "soap" else {}
    models = [task.make_model() for _ in range(2)]
    runs = [Runner(optimizers.make(name, task, model, settings=settings), task) for model in models]
    for _ in range(3):
        runs[0].advance()
    file = io.BytesIO()
    torch.save(runs[0].state_dict(), file)
    file.seek(0)
    runs[1].load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        for run in runs:
            run.advance()
    assert torch.equal(vector(models[0]), vector(models[1])) and runs[1].update == 7


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    found = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "pytorch_optimizer":
            raise ImportError(name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="natgrad\\[bench\\]"):
        rivals.soap([torch.nn.Parameter(torch.zeros(2, 2))])
