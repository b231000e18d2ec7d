"""`natgrad inspect`: the numbers are those of dense matrices, random vectors come near them, bad input is one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab.tiny import tiny_task
from torch import nn

import natgrad as ng
from natgrad.damping import pi
from natgrad_lab import cli, cli_inspect
from natgrad_lab.cli_inspect import condition
from natgrad_lab.inspection import inspect


def network() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).double()
        return model, torch.randn(60, 5, dtype=torch.float64)


def relative(exact: torch.Tensor, approximation: torch.Tensor) -> float:
    return ((exact - approximation).norm() / exact.norm()).item()


def test_dense_errors_are_those_of_the_matrices() -> None:
    model, x = network()
    likelihood = ng.Categorical()
    found = inspect(model, likelihood, x, damping=0.01, dense=1000)
    F = ng.Fisher(model, likelihood, x).to_dense()
    inverse = torch.linalg.inv(F + 0.01 * torch.eye(len(F)))
    for name, structure in (("F̆", "block_diagonal"), ("F̂", "block_tridiagonal"), ("EKFAC", "ekfac")):
        k = ng.kronecker_fisher(model, likelihood, x, structure=structure)
        assert found.errors[name]["matrix"] == pytest.approx(relative(F, k.to_dense()))
        for kind in ("factored", "exact"):
            if (structure, kind) in (("ekfac", "factored"), ("block_tridiagonal", "exact")):
                assert f"{kind} inverse" not in found.errors[name]
                continue
            error = relative(inverse, k.inverse(0.01, kind=kind).to_dense())
            assert found.errors[name][f"{kind} inverse"] == pytest.approx(error)
    factors = ng.kronecker_fisher(model, likelihood, x).factors
    for layer, members in zip(found.layers, ((0, 24), (24, 39), (39, 55)), strict=True):
        block = F[slice(*members), slice(*members)]
        k = ng.kronecker_fisher(model, likelihood, x).to_dense()[slice(*members), slice(*members)]
        assert layer.errors["F̆"] == pytest.approx(relative(block, k))
        assert layer.errors["EKFAC"] < layer.errors["F̆"]
        A, G = (factor.to_dense() for factor in (factors[layer.name].A, factors[layer.name].G))
        assert layer.eigenvalues_a == pytest.approx(torch.linalg.eigvalsh(A).flip(0).tolist(), abs=1e-12)
        assert layer.pi == pytest.approx(float(pi(A, G)))
    assert found.window["layers"] == ["0", "2", "4"] and found.window["sizes"] == [24, 15, 16]
    assert torch.allclose(found.matrices["F"], ng.Fisher(model, likelihood, x).to_dense(order="vec"))
    assert all(p.requires_grad for p in model.parameters())


def test_random_vectors_come_near_the_dense_errors() -> None:
    model, x = network()
    dense = inspect(model, ng.Categorical(), x, damping=0.01, dense=1000)
    random = inspect(model, ng.Categorical(), x, damping=0.01, dense=5, probes=200)
    assert random.about["errors from"] == "200 random vectors, the inverse from 4"
    assert random.window == {} and random.matrices == {}
    for name, errors in dense.errors.items():
        assert random.errors[name]["matrix"] == pytest.approx(errors["matrix"], rel=0.1)
    for layer, other in zip(dense.layers, random.layers, strict=True):
        assert other.errors["F̆"] == pytest.approx(layer.errors["F̆"], rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_random_vectors_do_not_hide_that_ekfac_is_nearer(seed: int) -> None:
    """Two vectors: the estimates are rough, but the squares of both errors differ by the known ‖EKFAC − F̆‖²."""
    model, x = network()
    rough = inspect(model, ng.Categorical(), x, damping=0.01, dense=5, probes=2, seed=seed)
    assert rough.errors["EKFAC"]["matrix"] < rough.errors["F̆"]["matrix"]
    for layer in rough.layers:
        assert layer.errors["EKFAC"] < layer.errors["F̆"]


def test_the_distance_of_ekfac_and_the_kronecker_product_has_the_scale_of_the_estimates() -> None:
    model, x = network()
    dense = inspect(model, ng.Categorical(), x, damping=0.01, dense=1000)
    many = inspect(model, ng.Categorical(), x, damping=0.01, dense=5, probes=1000)
    for layer, other in zip(dense.layers, many.layers, strict=True):
        apart, estimated = ((one.errors["F̆"] ** 2 - one.errors["EKFAC"] ** 2) ** 0.5 for one in (layer, other))
        assert estimated == pytest.approx(apart, rel=0.1)


def test_exact_inverse_by_conjugate_gradients() -> None:
    """With one linear layer and a Gaussian likelihood the factors are exact, and so is their inverse."""
    model, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(60, 5, dtype=torch.float64)
    found = inspect(model, ng.Gaussian(), x, damping=0.01, dense=5, probes=50)
    assert found.errors["EKFAC"]["matrix"] < 1e-10
    assert found.errors["EKFAC"]["exact inverse"] < 1e-2
    assert found.about["change of the exact inverse"] == 0.0  # they met their tolerance


def test_condition_numbers() -> None:
    assert condition([10.0, 1.0, 0.1]) == "1e+02"
    assert condition([10.0, 0.0]) == "∞"
    assert condition([10.0, -1e-15]) == "∞"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*arguments: Any) -> Any:
        import dataclasses

        task = dataclasses.replace(tiny_task(), likelihood=ng.Bernoulli())
        task.name = "curves"
        return task

    monkeypatch.setattr(cli, "load", load)
    monkeypatch.setattr(cli_inspect, "load", load)
    monkeypatch.chdir(tmp_path)


def test_task_and_checkpoint(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", "curves", "--rows", "20", "--out", "before"]) == 0
    out = capsys.readouterr().out
    assert "curves before training: 214 parameters, 20 cases" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("Errors")) <= 80
    assert {p.name for p in Path("before").iterdir()} == {"spectra.png", "fisher.png", "inspection.json"}
    assert cli.run(["train", "curves", "--optimizer", "sgd", "--updates", "5", "--out", "run"]) == 0
    assert cli.run(["inspect", "run", "--rows", "20", "--out", "after"]) == 0
    assert cli.run(["inspect", "run/checkpoint.pt", "--rows", "20", "--out", "file"]) == 0
    assert capsys.readouterr().out.count("curves after 5 updates") == 2
    assert Path("after/inspection.json").read_text() != Path("before/inspection.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curvs"], "Did you mean 'curves'?"),
        (["nowhere/checkpoint.pt"], "there is no checkpoint nowhere/checkpoint.pt"),
        (["curves", "--rows", "0"], "--rows is 0"),
        (["curves", "--damping", "-1"], "--damping is -1"),
        (["."], "there is no checkpoint in .; name the folder that natgrad train wrote"),
    ],
)
def test_bad_input_is_one_line(
    tiny: None, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run(["inspect", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
