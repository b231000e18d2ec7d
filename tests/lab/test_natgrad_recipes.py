"""The recipes of figures 2 to 5 and table 1 of [NATGRAD]: data, steps, resumption and what the table takes over."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad_lab.deformations import Deformation
from natgrad_lab.recipes.base import find
from natgrad_lab.recipes.natgrad_comparison import method_of
from natgrad_lab.recipes.natgrad_order import MSGD, NATURAL, Experiment, output_variance
from natgrad_lab.recipes.natgrad_problems import convolutional, faces
from natgrad_lab.recipes.natgrad_training import Problem, Training, glorot_, train
from natgrad_lab.recipes.run import Run

STILL = Deformation(rotation=0, stretch=0, shear=0, shift=0, field=0, fade=0, noise=0)


def _problem(dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x, u, t = (torch.randn(n, 5, generator=generator, dtype=dtype) for n in (12, 9, 7))
    y, s = (torch.randint(3, (n,), generator=generator) for n in (12, 7))

    def make_model(seed: int) -> nn.Module:
        return glorot_(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), seed).to(dtype)

    return Problem(make_model, x, y, t, s, u)


def _method(metric: str, **settings: Any) -> dict[str, Any]:
    common = {"batch": 12, "metric batch": 9, "lr": 0.3, "damping": 0.2, "adapts": False, "iterations": 60}
    return {**common, "metric": metric, "updates": 6, "every": 2, "decay": None, **settings}


def _vector(model: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("metric", ["none", "same", "different", "unlabelled", "joined", "covariance"])
def test_an_update_is_the_dense_step(metric: str) -> None:
    problem = _problem()
    method = _method(metric, **({"metric batch": 12} if metric == "different" else {}))
    training = Training(problem, method, 3)
    model, likelihood = problem.make_model(3), ng.Categorical()
    theta = _vector(model)
    loss = likelihood.nll(model(problem.x_train), problem.y_train)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    x, y, u = problem.x_train, problem.y_train, problem.unlabelled
    assert u is not None
    if metric == "none":
        expected = theta - 0.3 * gradient
    else:
        if metric == "covariance":
            matrix = ng.GradientCovariance(model, likelihood, x, y, centered=False).to_dense()
        else:
            inputs = {"unlabelled": u, "joined": torch.cat([u, x])}.get(metric, x)
            matrix = ng.Fisher(model, likelihood, inputs).to_dense()
        expected = theta - 0.3 * torch.linalg.solve(matrix + 0.2 * torch.eye(len(theta)).to(theta), gradient)
    training.advance()
    assert torch.allclose(_vector(training.model), expected, atol=2e-4)  # the solver stops at 1e-4


def test_batches_of_the_metric_are_others_than_those_of_the_gradient() -> None:
    training = Training(_problem(), _method("different", **{"batch": 6, "metric batch": 6}), 0)
    seen: list[Tensor] = []
    plain = ng.NaturalGradient.step

    def step(x: Tensor, y: Tensor, *, metric_inputs: Tensor, join: bool) -> Any:
        seen.extend((x, metric_inputs))
        return plain(training.optimizer, x, y, metric_inputs=metric_inputs, join=join)

    training.optimizer.step = step
    training.advance()
    assert seen[0].shape == seen[1].shape and not torch.equal(seen[0].sort(0).values, seen[1].sort(0).values)


def test_learning_rate_decays_as_configured() -> None:
    training = Training(_problem(), _method("none", decay=[2, 4]), 0)
    rates = []
    for _ in range(6):
        training.advance()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.3, 0.3, 0.3 / 1.25, 0.3 / 1.5, 0.3 / 1.75, 0.3 / 2])


@pytest.mark.parametrize("metric", ["unlabelled", "covariance", "none"])
def test_stopped_training_goes_on_to_the_same_end(metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(torch.float32)
    method = _method(metric, **{"batch": 5, "metric batch": 4, "adapts": True})

    def columns(name: str, stops: bool) -> Mapping[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        run = Run(find("natgrad-fig4"), tmp_path / name, quick=True)
        if not stops:
            return train(run, problem, "a method", method, 0)
        plain = Training.advance

        def advance(self: Training) -> None:
            plain(self)
            if self.update == 3:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Training, "advance", advance)
            train(run, problem, "a method", method, 0)
        return train(Run(find("natgrad-fig4"), tmp_path / name, quick=True), problem, "a method", method, 0)

    whole, stopped = columns("whole", False), columns("stopped", True)
    assert whole == stopped
    assert whole["update"] == [0, 2, 4, 6] and whole["end"] == "finished"
    assert whole["train"][-1] < whole["train"][0]


def test_runs_of_a_figure_differ_in_weights_and_batches(tmp_path: Path) -> None:
    """Run 2 of seed 3 is run 1 of seed 4, on the same data."""

    def results(seed: int, runs: int) -> dict[str, Any]:
        (tmp_path / str(seed)).mkdir()
        run = Run(find("natgrad-fig4"), tmp_path / str(seed), quick=True, seed=seed)
        run.configuration["runs"] = runs
        run.configuration["methods"] = {k: run.configuration["methods"][k] for k in ("MSGD", "KL, unlabelled")}
        return run.execute().results

    several, other = results(3, 2), results(4, 1)
    assert list(several) == ["MSGD, run 1", "KL, unlabelled, run 1", "MSGD, run 2", "KL, unlabelled, run 2"]
    assert [method_of(part) for part in several] == 2 * ["MSGD", "KL, unlabelled"]
    assert several["KL, unlabelled, run 2"] == other["KL, unlabelled, run 1"] != several["KL, unlabelled, run 1"]


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    run = Run(find("natgrad-fig4"), tmp_path, quick=True)
    found = train(run, _problem(torch.float32), "wild", _method("none", lr=3e38), 0)
    assert found["end"] == "diverged" and len(found["update"]) < 4


def test_metrics_are_checked() -> None:
    with pytest.raises(ValueError, match="expected one of none, same, different"):
        Training(_problem(), _method("hessian"), 0)
    problem = _problem()
    with pytest.raises(ValueError, match="no unlabelled inputs"):
        Training(Problem(problem.make_model, *([problem.x_train, problem.y_train] * 2)), _method("unlabelled"), 0)


def test_convolutional_network_has_the_sizes_that_it_says() -> None:
    model = convolutional(28, [[8, 5, 2], [16, 5, 2]], [100], 10)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
        (8, 1, 5, 5),
        (16, 8, 5, 5),
        (100, 256),
        (10, 100),
    ]
    assert model(torch.zeros(2, 784)).shape == (2, 10)


def test_every_person_has_as_many_photographs_in_each_part(tmp_path: Path) -> None:
    run = Run(find("natgrad-fig2"), tmp_path, quick=True)
    problem, other = faces(run, 0), faces(run, 1)
    assert problem.unlabelled is not None
    assert problem.y_train.bincount().tolist() == [3] * 10 and problem.y_test.bincount().tolist() == [23] * 10
    assert len(problem.unlabelled) == 40
    every = torch.cat([problem.x_train, problem.unlabelled, problem.x_test])
    assert len(every.unique(dim=0)) == 300  # no photograph is in two parts
    known = torch.cat([problem.x_train, problem.unlabelled])
    assert abs(known.mean()) < 1e-5 and known.std().item() == pytest.approx(1, abs=1e-4)
    assert not torch.equal(problem.x_train, other.x_train)


def test_deformations_do_what_they_are_called(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 7, 7, generator=generator)
    assert torch.allclose(STILL(images, generator), images, atol=1e-5)
    from dataclasses import replace

    faded = replace(STILL, fade=0.5)(images, generator)
    ratio = (faded / images).flatten(1)
    assert torch.allclose(ratio.amin(1), ratio.amax(1), atol=1e-4)
    assert ratio.min() >= 0.5 and ratio.max() <= 1 and ratio[:, 0].std() > 0.01
    ring = torch.zeros(200, 15, 15)
    ring[:, 6:9, 6:9] = 1
    moved = replace(STILL, shift=2 / 15)(ring, generator)  # at most two pixels each way
    assert moved.sum((1, 2)) == pytest.approx(9.0, abs=1e-3)
    rows = (moved * torch.arange(15.0)[:, None]).sum((1, 2)) / 9 - 7
    assert rows.abs().max() <= 2.001 and rows.abs().max() > 1.8 and rows.mean().abs() < 0.3
    turned = replace(STILL, rotation=45.0)(ring, generator)
    assert turned[:, 7, 7] == pytest.approx(1.0, abs=1e-5) and (turned - ring).abs().amax() > 0.2
    first, again = (Deformation()(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and first.min() >= 0 and first.max() <= 1


def test_a_resampling_changes_one_segment(tmp_path: Path) -> None:
    experiment = Experiment(Run(find("natgrad-fig3"), tmp_path, quick=True))
    base = list(experiment.stream())
    per = experiment.configuration["updates"]
    assert len(base) == 2 * 4 * per and all(len(x) == 64 for x, _ in base)
    for resampling in range(2):
        drawn = list(experiment.stream(1, resampling))
        same = [torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(base, drawn, strict=True)]
        assert same == [not per <= i < 2 * per for i in range(len(base))]
    assert not torch.equal(list(experiment.stream(1, 0))[per][0], list(experiment.stream(1, 1))[per][0])


def test_networks_start_alike_and_end_as_their_data_say(tmp_path: Path) -> None:
    experiment = Experiment(Run(find("natgrad-fig3"), tmp_path, quick=True))
    for method in (MSGD, NATURAL):
        first, again, other = (
            _vector(experiment.train(method, 0.3, experiment.stream(*which))) for which in ((), (), (0, 0))
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(*(_vector(experiment.train(method, 0.0, experiment.stream(0, k))) for k in (0, 1)))


def test_output_variance_is_unbiased_and_a_mean() -> None:
    outputs = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[5.0, 3.0]]])
    assert output_variance(outputs) == pytest.approx((4.0 + 3.0) / 2)


def test_table_takes_over_a_finished_figure_beside_it(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    def ends(where: str, seed: int) -> Mapping[str, Any]:
        run = Run(find("natgrad-table1"), folder(where), quick=True, seed=seed)
        run.configuration["figures"] = ["natgrad-fig2"]
        return run.execute().results["natgrad-fig2"]

    figure = Run(find("natgrad-fig2"), folder("natgrad-fig2-quick"), quick=True).execute()
    taken = ends("a", 0)
    assert not (tmp_path / "a" / "parts").exists()
    assert taken["started"] == figure.content["started"]
    found = taken["methods"]["KL, same batch"]
    assert found["test"] == [figure.results[f"KL, same batch, split {k}"]["test"][-1] for k in (1, 2)]
    made = ends("b", 1)  # another seed: not that figure's
    assert (tmp_path / "b" / "parts" / "natgrad-fig2" / "record.json").exists()
    assert made["methods"]["KL, same batch"] != found
