"""A race measures what it says, records it at once, and survives divergence, faults and Ctrl-C."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.tiny import PlainBernoulli, competitor, tiny_task
from torch import Tensor, nn

from natgrad_lab import optimizers, race
from natgrad_lab.memory import peak_bytes
from natgrad_lab.records import Evaluation, Race, Trace, read_lines
from natgrad_lab.runner import Batches, Runner, reconstruction_error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Race, Path]:
    out = tmp_path_factory.mktemp("race")
    return race.run(tiny_task(), ["adam", "sgd"], seconds=0.5, out=out, seed=3, evaluations=12), out


def test_every_optimizer_starts_alike_and_gets_its_seconds(finished: tuple[Race, Path]) -> None:
    result, _ = finished
    adam, sgd = result.traces["adam"], result.traces["sgd"]
    assert adam.evaluations[0].train_error == sgd.evaluations[0].train_error
    assert adam.evaluations[0].update == 0
    for trace in (adam, sgd):
        assert trace.end is not None
        assert trace.end.reason == "finished"
        assert 0.45 < trace.end.seconds < 0.75
        assert trace.end.examples == trace.end.update * 90  # batches of 250 do not exist: the whole set
        assert [e.seconds for e in trace.evaluations] == sorted(e.seconds for e in trace.evaluations)
        assert trace.train_error < adam.evaluations[0].train_error
        assert trace.end.peak_bytes is not None


def test_records_tell_configuration_seed_and_versions(finished: tuple[Race, Path]) -> None:
    result, out = finished
    lines = read_lines(out / "records.jsonl")
    assert [line["kind"] for line in lines].count("end") == 2
    header = lines[0]
    assert (header["kind"], header["task"], header["seed"], header["averaging"]) == ("race", "tiny", 3, 0.99)
    assert header["optimizers"]["adam"]["lr"] > 0
    assert header["environment"]["torch"] == torch.__version__
    assert len(result.traces["adam"].evaluations) == sum(
        line["kind"] == "evaluation" and line["optimizer"] == "adam" for line in lines
    )


def test_takes_little_more_than_its_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    race.run(tiny_task(), ["adam", "sgd"], seconds=1.0, out=tmp_path)
    assert time.perf_counter() - start < 2.0 + 2.5  # the profiler's start, once, is most of the rest


def test_error_is_the_mean_over_cases_of_summed_squares() -> None:
    task = tiny_task(train=2500)
    model = task.make_model()
    expected = (torch.sigmoid(model(task.x_train)) - task.x_train).detach().double().square().sum(1).mean()
    error = reconstruction_error(model, PlainBernoulli(), task.x_train, task.x_train)
    assert error == pytest.approx(float(expected), rel=1e-6)


def test_better_of_iterate_and_average_is_chosen_on_training_data_alone() -> None:
    task = tiny_task()
    runner = Runner(optimizers.make("sgd", task, task.make_model()), task)
    runner.advance()
    with torch.no_grad():
        for p in runner.average.module.parameters():
            p.mul_(1.5)
    e = runner.evaluate()
    model = runner.competitor.model if e.iterate_error <= e.average_error else runner.average.module
    assert e.iterate_error != e.average_error
    assert e.train_error == min(e.iterate_error, e.average_error)
    assert e.test_error == reconstruction_error(model, task.likelihood, task.x_test, task.x_test)


def test_running_average_has_the_papers_decay_after_a_plain_mean() -> None:
    task = tiny_task()
    runner = Runner(optimizers.make("sgd", task, task.make_model()), task)
    expected = torch.zeros_like(runner.competitor.model[0].weight)
    for k in range(1, 121):
        runner.advance()
        xi = min(1 - 1 / k, 0.99)
        expected = xi * expected + (1 - xi) * runner.competitor.model[0].weight.detach()
    assert torch.allclose(runner.average.module[0].weight, expected, rtol=0, atol=1e-6)


def test_batches_cover_each_epoch_once_and_resume() -> None:
    batches = Batches(10, seed=5)
    drawn = torch.cat([batches.next(4) for _ in range(5)])  # two epochs, the third batch crosses the border
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    other = Batches(10, seed=0)
    other.load_state_dict(batches.state_dict())
    assert torch.equal(other.next(7), batches.next(7))
    assert batches.next(10) == slice(None)


def test_divergence_is_marked_and_the_others_go_on(tmp_path: Path) -> None:
    def make(name: str, task: Any, model: nn.Module, *, seed: int) -> optimizers.Competitor:
        if name != "bad":
            return optimizers.make(name, task, model, seed=seed)
        calls: list[int] = []

        def step(x: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            return torch.tensor(math.nan if len(calls) == 3 else 1.0)

        return competitor(name, task, model, step)

    result = race.run(tiny_task(), ["bad", "adam"], seconds=0.2, out=tmp_path, make=make)
    bad = result.traces["bad"].end
    assert bad is not None
    assert (bad.reason, bad.update) == ("diverged", 3)
    assert "nan at update 3" in bad.message
    adam = result.traces["adam"].end
    assert adam is not None
    assert adam.reason == "finished"


def test_a_fault_of_one_optimizer_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    def make(name: str, task: Any, model: nn.Module, *, seed: int) -> optimizers.Competitor:
        def step(x: Tensor, y: Tensor) -> Tensor:
            raise RuntimeError("matrix is not positive definite")

        return competitor(name, task, model, step) if name == "bad" else optimizers.make(name, task, model, seed=seed)

    result = race.run(tiny_task(), ["bad", "adam"], seconds=0.1, out=tmp_path, make=make)
    bad = result.traces["bad"].end
    assert bad is not None
    assert (bad.reason, bad.message) == ("failed", "RuntimeError: matrix is not positive definite")
    assert any(line["kind"] == "traceback" for line in read_lines(tmp_path / "records.jsonl"))
    assert result.traces["adam"].end is not None
    assert result.traces["adam"].end.reason == "finished"


@pytest.mark.parametrize("how", ["raised inside an update", "as a signal"])
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, how: str) -> None:
    done: list[int] = []

    def make(name: str, task: Any, model: nn.Module, *, seed: int) -> optimizers.Competitor:
        made = optimizers.make("sgd", task, model, seed=seed)
        plain = made.step

        def step(x: Tensor, y: Tensor) -> Tensor:
            done.append(1)
            if len(done) == 60:
                if how == "as a signal":
                    os.kill(os.getpid(), signal.SIGINT)
                    assert len(done) == 60  # held back until the update is over
                else:
                    raise KeyboardInterrupt
            return plain(x, y)

        return optimizers.Competitor(name, model, made.optimizer, step, made.batch_size, made.settings)

    handler = signal.getsignal(signal.SIGINT)
    result = race.run(tiny_task(), ["one", "two"], seconds=5.0, out=tmp_path, make=make, evaluations=400)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(done) == 60
    assert result.interrupted
    for trace in result.traces.values():
        assert trace.end is not None
        assert trace.end.reason == "interrupted"
        assert trace.evaluations
    assert sum(t.end.update for t in result.traces.values() if t.end) == (60 if how == "as a signal" else 59)


def test_records_are_on_disk_while_the_race_runs(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watcher(race.Silent):
        def evaluated(self, evaluation: Evaluation) -> None:
            seen.append(len(read_lines(tmp_path / "records.jsonl")))

    race.run(tiny_task(), ["sgd"], seconds=0.1, out=tmp_path, observer=Watcher(), evaluations=5)
    assert seen == list(range(2, 2 + len(seen)))  # the header, then each evaluation as it comes


def test_an_earlier_race_in_the_folder_is_moved_aside(tmp_path: Path) -> None:
    for _ in range(2):
        race.run(tiny_task(), ["sgd"], seconds=0.05, out=tmp_path, evaluations=2)
    assert {p.name for p in tmp_path.iterdir()} == {"records.jsonl", "records.1.jsonl"}


def test_a_line_cut_by_a_kill_is_ignored_and_a_broken_one_named(finished: tuple[Race, Path], tmp_path: Path) -> None:
    text = (finished[1] / "records.jsonl").read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[:-20])
    assert len(read_lines(cut)) == len(text.splitlines()) - 1
    assert Race.read(cut).interrupted
    cut.write_text(text.replace("\n", "\n{broken\n", 1))
    with pytest.raises(ValueError, match="line 2"):
        read_lines(cut)


def test_numbers_that_json_lacks_become_null_and_come_back_as_nan(finished: tuple[Race, Path]) -> None:
    first = next(r for r in read_lines(finished[1] / "records.jsonl") if r["kind"] == "evaluation")
    assert first["loss"] is None  # no update yet
    assert math.isnan(finished[0].traces["adam"].evaluations[0].loss)
    json.dumps(first, allow_nan=False)


def test_first_evaluation_at_an_error() -> None:
    def at(seconds: float, error: float) -> Evaluation:
        return Evaluation("a", int(seconds), 0, seconds, seconds, 1, 0.0, error, error, error, error)

    trace = Trace("a", {}, [at(1, 9.0), at(2, 4.0), at(3, 5.0), at(4, 2.0)])
    assert [getattr(trace.first_at(error), "seconds", None) for error in (10, 9, 4.5, 2, 1)] == [1, 1, 2, 4, None]


def test_evaluation_times_end_at_the_end() -> None:
    times = race.evaluation_times(55.0, 40)
    assert times == sorted(times)
    assert times[-1] == 55.0
    assert times[0] == pytest.approx(0.55)
    assert 35 <= len(times) <= 40
    assert race.evaluation_times(1.0, 1) == [1.0]
    assert race.evaluation_times(1.0, 2) == [0.5, 1.0]


def test_peak_memory_counts_tensors_alive_at_once() -> None:
    def allocate() -> Tensor:
        a = torch.zeros(250_000)  # 1 MB
        b = torch.zeros(500_000)  # 2 MB, together 3
        del a
        c = torch.zeros(125_000)  # 0.5 MB, together 2.5
        return b.sum() + c.sum()

    assert 3.0e6 <= peak_bytes(allocate) < 3.01e6


def test_baseline_settings_come_from_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optimizers, "RECIPES", tmp_path)
    assert optimizers.baseline_settings("adam", "curves") == {"lr": 1e-3, "batch_size": 250}
    (tmp_path / "baselines.json").write_text('{"curves": {"adam": {"lr": 0.002, "batch_size": 500}}, "command": "…"}')
    assert optimizers.baseline_settings("adam", "curves") == {"lr": 2e-3, "batch_size": 500}
    assert optimizers.baseline_settings("adam", "digits") == {"lr": 1e-3, "batch_size": 250}
    assert optimizers.baseline_settings("nesterov", "curves") == {"lr": 3e-3, "mu_max": 0.99, "batch_size": 250}
    (tmp_path / "baselines.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        optimizers.baseline_settings("adam", "curves")


def test_kfac_settings_merge_key_by_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optimizers, "RECIPES", tmp_path)
    recipe = {
        "default": {"kfac": {"batch_size": {"start": 300, "at": 400}, "arguments": {"l2": 1e-5}}},
        "curves": {"kfac": {"batch_size": {"start": 600}}},
    }
    (tmp_path / "kfac.json").write_text(json.dumps(recipe))
    expected = {"batch_size": {"start": 600, "at": 400}, "arguments": {"l2": 1e-5}}
    assert optimizers.kfac_settings("kfac", "curves") == expected


@pytest.mark.parametrize("name", ["adam", "adamw", "nesterov", "sgd"])
def test_every_baseline_lowers_the_loss(name: str) -> None:
    task = tiny_task()
    made = optimizers.make(name, task, task.make_model(), settings={"batch_size": 30})
    assert made.batch_size(1) == made.batch_size(1000) == 30
    losses = [float(made.step(task.x_train, task.y_train)) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_unknown_optimizer_is_named_with_the_nearest_known() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adm'. Did you mean 'adam'"):
        optimizers.check_name("adm")
