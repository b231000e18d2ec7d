"""The thesis' search experiments: networks trained together against PyTorch's own SGD, and what the table says."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from natgrad_lab import cli
from natgrad_lab.figures import drawing, thesis
from natgrad_lab.recipes.many import final_costs
from natgrad_lab.recipes.run import Record

SIZES = [6, 5, 3, 4, 6]


def test_networks_trained_together_are_those_of_autograd_and_sgd():
    """The same draws, network by network, float64."""
    x = torch.rand(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lr, alpha = torch.tensor([0.1, 0.01, 0.05], dtype=torch.float64), torch.tensor([1.0, 6.0, 0.3], dtype=torch.float64)
    found = final_costs(x, SIZES, lr, alpha, batch=4, iterations=7, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    pairs = list(zip(SIZES, SIZES[1:], strict=False))
    drawn = [2 * torch.rand(3, *pair, generator=generator, dtype=torch.float64) - 1 for pair in pairs]
    batches = [torch.randint(30, (3, 4), generator=generator) for _ in range(7)]
    for k in range(3):
        linear = [nn.Linear(*pair, dtype=torch.float64) for pair in pairs]
        for layer, u, (n_in, n_out) in zip(linear, drawn, pairs, strict=True):
            layer.weight.data = (u[k] * math.sqrt(3 * alpha[k] / (n_in + n_out))).T.clone()
            layer.bias.data.zero_()
        net = nn.Sequential(linear[0], nn.Tanh(), linear[1], linear[2], nn.Tanh(), linear[3])
        optimizer = torch.optim.SGD(net.parameters(), lr=lr[k].item())
        for rows in batches:
            optimizer.zero_grad()
            (net(x[rows[k]]) - x[rows[k]]).square().sum(dim=1).mean().backward()
            optimizer.step()
        assert found[k].item() == pytest.approx((net(x) - x).square().sum(dim=1).mean().item(), rel=1e-12)


def test_initial_weights_have_the_variance_of_the_setting():
    """A linear network of one layer that is not trained: E ‖Wx‖² = variance · n_out · ‖x‖²."""
    x = torch.ones(1, 20, dtype=torch.float64)
    alpha = torch.full((4000,), 3.0, dtype=torch.float64)
    costs = final_costs(
        x, [20, 20], torch.zeros(4000), alpha, batch=1, iterations=0, generator=torch.Generator().manual_seed(0)
    )
    expected = 3.0 / 40 * 20 * 20 + 20  # and ‖x‖² for the target
    assert costs.mean().item() == pytest.approx(expected, rel=0.02)


def test_what_diverges_is_nan_and_leaves_the_others_alone():
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    lr, alpha = torch.tensor([1e4, 1e-2]), torch.ones(2)
    generator = torch.Generator().manual_seed(0)
    costs = final_costs(x, SIZES, lr, alpha, batch=4, iterations=50, generator=generator)
    assert costs[0].isnan() and 0.0 < costs[1] < 2.5


def run(name: str, folder: Path) -> Record:
    assert cli.run(["paper", "run", name, "--quick", "--out", str(folder)]) == 0
    return Record.read(folder)


def test_the_table_has_means_and_deviations_of_all_searches(tmp_path: Path) -> None:
    record = run("thesis-table4.1", tmp_path)
    rows = {row[0]: row[1:] for row in drawing.draw(record).rows}
    for method, printed in (("grid", "27.23 ± 0.42"), ("random", "27.02 ± 0.28"), ("biased", "26.61 ± 0.13")):
        parts = [v for k, v in record.results.items() if k.startswith(method)]
        best = torch.tensor([b for part in parts for b in part["best"]], dtype=torch.float64)
        assert len(best) == record.configuration["searches"] == 6 and len(set(best.tolist())) == 6
        assert rows[thesis.TITLES[method]] == (printed, f"{best.mean():.3f} ± {best.std():.3f}")


def test_a_grid_looks_where_it_should_and_the_others_within_the_domain(tmp_path: Path) -> None:
    results = run("thesis-fig4.1", tmp_path).results
    assert len({(t["lr"], t["alpha"]) for t in results["grid"]["trials"]}) == 16
    assert sorted({t["lr"] for t in results["grid"]["trials"]}) == pytest.approx([10 ** (-3.5 + i) for i in range(4)])
    for method in ("random", "biased"):
        trials = results[method]["trials"]
        assert len(trials) == 16 and all(1e-4 <= t["lr"] <= 1.0 and 1e-2 <= t["alpha"] <= 1e2 for t in trials)
        assert results[method]["best"] == min(t["cost"] for t in trials if t["cost"] is not None)
    assert results["random"]["trials"][2:] != results["biased"]["trials"][2:]


def test_runs_repeat_by_seed(tmp_path: Path) -> None:
    first, second = (run("thesis-fig4.1", tmp_path / name).results for name in ("a", "b"))
    assert first == second
