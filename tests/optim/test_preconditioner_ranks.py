"""Several ranks: statistics add up, so that every rank takes the step of one process with all examples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.preconditioning import EVERY_STEP, batch, exact, mlp, targets
from torch import Tensor, distributed, multiprocessing, nn

import natgrad as ng
from natgrad.distributed import collectives
from natgrad.optim import preconditioner_statistics

LIKELIHOODS = {"example": ng.Bernoulli(), "element": ng.Bernoulli("element"), "none": ng.Bernoulli("none")}


def steps(
    model: Any, x: Tensor, y: Tensor, normalizer: str, expectation: str = "exact", structure: str = "ekfac"
) -> Any:
    """Three steps of SGD with the preconditioner inside; the parameters and the factors."""
    likelihood = LIKELIHOODS[normalizer]
    pre = exact(model, likelihood, expectation=expectation, structure=structure, form=None, periods=EVERY_STEP)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), pre)
    for _ in range(3):
        optimizer.zero_grad()
        z = model(x)
        pre.observe(z, y)
        likelihood.nll(z, y).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), pre


def run(rank: int, file: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    y = targets(ng.Bernoulli())
    rows = slice(0, 6) if rank == 0 else slice(6, 12)
    found: dict[str, Any] = {}
    for normalizer in ("example", "element"):
        for expectation in ("exact", "empirical"):
            model = nn.parallel.DistributedDataParallel(mlp(4, 5, 3))
            found[f"{normalizer}-{expectation}"] = steps(model, batch()[rows], y[rows], normalizer, expectation)[0]
    model = nn.parallel.DistributedDataParallel(mlp(4, 5, 3))
    _, pre = steps(model, batch()[rows], y[rows], "none")
    found["none"] = pre._running.factors["0"].G
    model = nn.parallel.DistributedDataParallel(mlp(4, 5, 3))
    _, pre = steps(model, batch()[rows], y[rows], "example", "sampled")
    found["sampled"] = pre._running.factors["0"].G
    found["stream"] = pre._generator.initial_seed()
    if rank == 0:  # the other one forgets
        pre.observe(model(batch()[rows]))
    ng.Bernoulli().nll(model(batch()[rows]), y[rows]).backward()
    try:
        pre.step()
    except RuntimeError as error:
        found["error"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    multiprocessing.start_processes(run, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="spawn")
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, y = batch(), targets(ng.Bernoulli())
    for normalizer in ("example", "element"):
        for expectation in ("exact", "empirical"):
            expected, _ = steps(mlp(4, 5, 3), x, y, normalizer, expectation)
            key = f"{normalizer}-{expectation}"
            assert torch.equal(one[key], two[key])
            torch.testing.assert_close(one[key], expected, rtol=1e-6, atol=1e-8)  # eigenvectors round
    assert torch.equal(one["none"], two["none"]) and torch.equal(one["sampled"], two["sampled"])
    assert one["stream"] == 0 and two["stream"] != 0  # draws of their own
    assert one["error"] == two["error"] and "on every rank ahead of a step" in one["error"]


@pytest.mark.parametrize("normalizer", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "input_covariance"])
def test_two_simulated_ranks(normalizer: str, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are two halves in turn, whose messages are added by hand; the curvature is that of the ranks' mean loss."""
    likelihood, model, x, y = LIKELIHOODS[normalizer], mlp(4, 5, 3), batch(), targets(ng.Bernoulli())
    messages: list[dict[str, Tensor]] = []

    def summed(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        messages.append({name: tensor.clone() for name, tensor in tensors.items()})
        if len(messages) == 1:
            return tensors
        return {name: messages[0][name] + tensor for name, tensor in tensors.items()}

    def observed(rows: slice) -> ng.Preconditioner:
        pre = exact(model, likelihood, structure=structure, form=None)
        pre.observe(model(x[rows]))
        likelihood.nll(model(x), y).backward()
        pre.step()
        return pre

    alone = observed(slice(0, 12))
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "agree", lambda number, device: True)
    monkeypatch.setattr(collectives, "summed", summed)
    observed(slice(0, 5))
    both = observed(slice(5, 12))
    share = 0.5 if normalizer == "none" and structure != "input_covariance" else 1.0  # mean of sums over 2 ranks
    for name, factors in alone._running.factors.items():
        found = both._running.factors[name]
        torch.testing.assert_close(found.to_dense(), share * factors.to_dense(), rtol=1e-10, atol=1e-14)
    assert preconditioner_statistics.over_ranks(None, torch.device("cpu")) is None


def test_sharded_parameters_are_refused() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = mlp(4, 3, 3)
        distributed.tensor.distribute_module(model[2], distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"2\.weight: sharded over ranks \(a DTensor\).*DistributedDataParallel"):
            ng.Preconditioner(model, ng.Bernoulli())
    finally:
        distributed.destroy_process_group()
