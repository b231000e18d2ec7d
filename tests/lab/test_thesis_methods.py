"""The comparisons of [THESIS, sec. 6.6]: networks, their training, the search in them, and continuing after a stop."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad.training import MeanOnlyBatchNorm
from natgrad_lab import labelled
from natgrad_lab.figures import drawing
from natgrad_lab.figures.thesis_methods import best
from natgrad_lab.files import CIFAR_BATCHES, CIFAR_ROW, DataError
from natgrad_lab.recipes import Run
from natgrad_lab.recipes.base import find
from natgrad_lab.recipes.run import Record
from natgrad_lab.recipes.thesis_methods import RATES
from natgrad_lab.recipes.thesis_training import OPTIMIZERS, Task, load_task, network, train

SIZES = [6, 5, 2, 5, 6]
X = torch.rand(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TASK = Task(X, X, X[:9], X[:9], ng.Gaussian(), SIZES, 1, 2.0)
CLASSES = torch.arange(40) % 3
CLASSIFY = Task(X, CLASSES, X[:9], CLASSES[:9], ng.Categorical(), [6, 4, 3], None, math.log(3))


def quick(name: str, folder: Path, **changes: Any) -> Run:
    made = find(name)
    folder.mkdir(exist_ok=True)
    size = dataclasses.replace(made.quick, configuration={**made.quick.configuration, **changes})
    return Run(dataclasses.replace(made, quick=size), folder, quick=True)


def test_code_and_output_are_linear_and_normalised_layers_have_no_bias() -> None:
    kinds = [type(m) for m in network(TASK, "tanh", None, 1.0, 0)]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear, nn.Tanh, nn.Linear]
    for norm, kind in (("batch", nn.BatchNorm1d), ("mean-only", MeanOnlyBatchNorm)):
        model = network(TASK, "relu", norm, 1.0, 0)
        linear = [m for m in model if isinstance(m, nn.Linear)]
        assert [m.bias is not None for m in linear] == [False, False, False, True]
        assert [m.running_mean.numel() for m in model if isinstance(m, kind)] == SIZES[1:-1]
        assert sum(isinstance(m, nn.ReLU) for m in model) == 2


@pytest.mark.parametrize(("units", "expected"), [("tanh", 3.0 / 1000), ("relu", 3.0 / 400)])
def test_initial_weights_have_the_variance_of_the_setting(units: str, expected: float) -> None:
    model = network(dataclasses.replace(TASK, sizes=[400, 600, 400], code=None), units, None, 3.0, 0)
    weight = model[0].weight
    assert isinstance(weight, torch.Tensor)
    assert weight.var().item() == pytest.approx(expected, rel=0.01)
    assert weight.abs().max().item() <= math.sqrt(3 * expected)


def test_losses_are_those_of_the_thesis() -> None:
    model = network(TASK, "tanh", "batch", 1.0, 0)
    loss, wrong = TASK.loss(model, X, X)
    model.eval()
    assert loss == pytest.approx((model(X) - X).square().sum(1).mean().item(), rel=1e-12) and wrong == 0.0
    model = network(CLASSIFY, "relu", None, 2.0, 0)
    loss, wrong = CLASSIFY.loss(model, X, CLASSES)
    assert loss == pytest.approx(nn.functional.cross_entropy(model(X), CLASSES).item(), rel=1e-12)
    assert wrong == pytest.approx((model(X).argmax(1) != CLASSES).double().mean().item())
    assert model.training


def dense_kfac(model: nn.Sequential, s: dict[str, float], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """W and b after one step of lr (Ā ⊗ G + damping)^{-1} ∇ with the factors of this batch, targets sampled."""
    pre = ng.Preconditioner(model, ng.Gaussian(), damping=s["damping"], seed=3, scaling=None, decay=0.0)
    z = model(x)
    pre.observe(z)
    ng.Gaussian().nll(z, x).backward()
    pre.step()
    return {name: p.detach() - s["lr"] * p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_every_optimizer_makes_the_step_that_it_is_named_for() -> None:
    s = {"lr": 0.05, "damping": 0.3}
    models = {name: network(TASK, "tanh", None, 1.0, 0) for name in OPTIMIZERS}
    steps = {name: make(models[name], TASK, s, 100, 3) for name, make in OPTIMIZERS.items()}
    losses = {name: float(step(X, X) or math.nan) for name, step in steps.items()}
    assert len({round(loss, 10) for loss in losses.values()}) == 1
    for name in ("centered", "acp"):
        twin = network(TASK, "tanh", None, 1.0, 0)
        given = {"damping": 0.3} if name == "acp" else {}
        (ng.ACP if name == "acp" else ng.CenteredSGD)(twin, ng.Gaussian(), lr=0.05, **given).step(X, X)
        for p, q in zip(models[name].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    twin = network(TASK, "tanh", None, 1.0, 0)
    for name, q in dense_kfac(twin, s, X).items():
        torch.testing.assert_close(models["kfac"].get_parameter(name).detach(), q)
    twin = network(TASK, "tanh", None, 1.0, 0)
    ng.Gaussian().nll(twin(X), X).backward()
    for p, q in zip(models["sgd"].parameters(), twin.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.detach(), q.detach() - 0.05 * q.grad)


def test_kfac_renews_at_the_first_update_and_then_every_n(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    observe = ng.Preconditioner.observe
    monkeypatch.setattr(
        ng.Preconditioner, "observe", lambda self, *a, **k: (seen.append(self.due), observe(self, *a, **k))[1]
    )
    step = OPTIMIZERS["kfac"](network(TASK, "tanh", None, 1.0, 0), TASK, {"lr": 0.01, "damping": 1.0}, 4, 0)
    for _ in range(9):
        step(X, X)
    assert [i for i, due in enumerate(seen, 1) if due] == [1, 4, 8]


def test_what_diverges_stops_and_is_told(tmp_path: Path) -> None:
    run = quick("thesis-fig6.1", tmp_path)
    task = load_task(run)
    method = run.configuration["methods"]["SGD"]
    found = train(run, task, "x", method, {"init": 1.0, "lr": 1e3}, seconds=60.0, marks=600)
    assert found["end"] == "diverged" and len(found["seconds"]) < 600
    assert not found["train"][-1] <= 3 * task.worst


def test_a_stopped_comparison_goes_on_with_the_same_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With costs that depend on the settings alone, stopped and continued is the same as never stopped."""
    from natgrad_lab.recipes import thesis_methods

    calls: list[str] = []

    def train(run: Run, task: Any, label: str, method: Any, settings: Any, **others: Any) -> dict[str, Any]:
        calls.append(label)
        if len(calls) == 5 and run.folder.name == "stopped":
            raise KeyboardInterrupt
        cost = abs(math.log(settings["lr"] / 0.02)) + settings["init"]
        end = "diverged" if settings["lr"] > 0.05 else "finished"
        return {
            "settings": dict(settings),
            "end": end,
            "seconds": [0.0],
            "update": [1],
            "train": [cost],
            "test": [cost],
        }

    monkeypatch.setattr(thesis_methods, "train", train)
    changes = {"trials": 4, "finalists": 2}
    whole = quick("thesis-fig6.1", tmp_path / "whole", **changes)
    expected = whole.execute().results
    assert len(calls) == 3 * (4 + 2)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        quick("thesis-fig6.1", tmp_path / "stopped", **changes).execute()
    done = calls[:4]
    calls[:] = ["again"] * 5
    results = quick("thesis-fig6.1", tmp_path / "stopped", **changes).execute().results
    assert results == expected and not set(calls) & set(done)
    trials = [expected[f"SGD, trial {i}"] for i in range(1, 5)]
    good = sorted((t for t in trials if t["end"] == "finished"), key=lambda t: t["train"][0])
    assert expected["SGD, best 1"]["settings"] == good[0]["settings"]
    assert best(Record.read(tmp_path / "whole"), "SGD") == expected["SGD, best 1"]
    assert len({tuple(expected[f"{m}, trial 1"]["settings"].values()) for m in whole.configuration["methods"]}) == 3


def test_the_table_and_the_lines_show_the_best_run(tmp_path: Path) -> None:
    changes = {"methods": {"SGD": {"optimizer": "sgd", "norm": None, "space": RATES}}, "finalists": 2}
    record = quick("thesis-sec4.3", tmp_path, **changes).execute()
    shown = best(record, "SGD")
    assert shown is not None
    figure = drawing.draw(record).figures[""]
    for axes, column in zip(figure.axes, ("train", "test"), strict=True):
        x, y = (np.asarray(v, dtype=float) for v in axes.get_lines()[0].get_data())
        assert x.tolist() == shown["seconds"][1:] and y.tolist() == shown[column][1:]
    text = json.dumps(drawing.draw(record).rows)
    assert f"train {shown['train'][-1]:.3g}" in text and f"{100 * shown['test_wrong'][-1]:.1f} % wrong" in text


def test_cifar_in_the_binary_version(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6, 4, CIFAR_ROW), dtype=np.uint8)
    rows[:, :, 0] %= 10
    for name, batch in zip(CIFAR_BATCHES, rows, strict=True):
        (tmp_path / name).write_bytes(batch.tobytes())
    found = labelled.load("cifar10", tmp_path)
    assert found.x_train.shape == (20, 3072) and found.x_test.shape == (4, 3072) and found.channels == 3
    assert found.y_train.tolist() == rows[:5, :, 0].flatten().tolist()
    torch.testing.assert_close(found.x_test[2] * 255, torch.from_numpy(rows[5, 2, 1:]).float())
    half = found.resized(16)
    blue = found.x_train[3, 2048:].view(32, 32)[:2, :2].mean()
    assert half.x_train.shape == (20, 768) and half.x_train[3, 512].item() == pytest.approx(blue.item())
    (tmp_path / CIFAR_BATCHES[0]).write_bytes(b"\x0b" + bytes(CIFAR_ROW - 1))
    with pytest.raises(DataError, match="is corrupt"):
        labelled.load("cifar10", tmp_path)
    with pytest.raises(DataError, match="CIFAR-10 was not found"):
        labelled.load("cifar10", tmp_path / "none")
