"""`natgrad search`: what it writes, how it goes on, and how it refuses."""

import json
import re
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import optuna
import pytest
from lab.tiny import load_tiny, tiny_task
from optuna.trial import TrialState

from natgrad_lab import cli, cli_search, optimizers
from natgrad_lab.runner import Diverged, Runner
from natgrad_lab.search import report, spaces
from natgrad_lab.search import study as searching
from natgrad_lab.search.space import Domain
from natgrad_lab.search.trial import Budget, train

SHORT = ["--updates", "3", "--optimizer", "sgd"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny task in place of CURVES, a folder of its own to write to, and no pictures: they take seconds."""

    monkeypatch.setattr(cli_search, "load", load_tiny)
    monkeypatch.setattr(report, "_plots", lambda study: [])
    monkeypatch.chdir(tmp_path)


def search(*arguments: str) -> int:
    return cli.run(["search", "curves", *SHORT, "--out", "result", *arguments])


def trials(path: str = "result/search.db", name: str = "curves-sgd") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}").trials


def test_a_search_writes_report_and_records_and_goes_on(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("--trials", "4") == 0
    assert {p.name for p in Path("result").iterdir()} == {"search.db", "report.html", "trials.json"}
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("Searching", "trial "))) <= 80
    assert "Best of 4 trials: training error" in out and out.rstrip().endswith("Report: result/report.html")
    first = [t.params for t in trials()]
    assert search("--trials", "7") == 0
    assert "; 4 are done" in capsys.readouterr().out
    assert [t.params for t in trials()][:4] == first and len(trials()) == 7
    record = json.loads(Path("result/trials.json").read_text())
    assert [t["number"] for t in record["trials"]] == list(range(7)) and record["trials"][0]["updates"] == 3
    assert {t["sampler"] for t in record["trials"]} == {"biased"}


def test_the_report_has_pictures_of_optuna_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    space, budget = spaces.space_of("sgd"), Budget("sgd", None, 1, 0, "tanh")
    study = searching.open_study(optuna.storages.InMemoryStorage(), "s", "curves", budget, space)
    for i in range(6):
        study.tell(study.ask(space), 3.0 + i % 4)
    backend, style = matplotlib.get_backend(), dict(matplotlib.rcParams)
    page = report.render(study)
    assert page.count('<img src="data:image/png;base64,') == 6
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert matplotlib.get_backend() == backend and dict(matplotlib.rcParams) == style


def test_a_finished_search_is_reported_again(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert search("--trials", "2") == 0
        Path("result/report.html").unlink()
    assert len(trials()) == 2


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_continued_search_proposes_new_points(tiny: None, sampler: str) -> None:
    search("--sampler", sampler, "--trials", "3")
    search("--sampler", sampler, "--trials", "6")
    assert len({t.params["lr"] for t in trials()}) == 6


def test_a_grid_is_kept_with_the_study_and_then_complete(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert search("--sampler", "grid", "--trials", "11") == 0
    points = {(t.params["lr"], t.params["batch_size"]) for t in trials()}
    assert len(trials()) == len(points) == 9 and len({lr for lr, _ in points}) == 3
    assert search("--sampler", "grid", "--trials", "30") == 0
    assert len(trials()) == 9


def test_a_grid_has_as_many_points_as_fit() -> None:
    space = {
        "lr": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
        "mu": optuna.distributions.CategoricalDistribution([0.0, 0.9]),
        "n": optuna.distributions.IntDistribution(1, 9),
    }
    points = spaces.grid(space, 20)
    assert points["lr"] == pytest.approx([10 ** (-4 + 4 * (i + 0.5) / 3) for i in range(3)])
    assert points["mu"] == [0.0, 0.9] and points["n"] == [2, 5, 8]
    assert {name: len(values) for name, values in spaces.grid(space, 1).items()} == {"lr": 1, "mu": 1, "n": 1}


def test_memory_leaves_a_report_and_no_database(tiny: None) -> None:
    assert search("--trials", "2", "--storage", "memory") == 0
    assert {p.name for p in Path("result").iterdir()} == {"report.html", "trials.json"}


def test_a_storage_may_be_a_file_or_a_url_and_hold_several_studies(tiny: None) -> None:
    assert search("--trials", "2", "--storage", "all.db") == 0
    assert search("--trials", "3", "--storage", "sqlite:///all.db", "--study", "other") == 0
    assert [len(trials("all.db", name)) for name in ("curves-sgd", "other")] == [2, 3]


def fail_at(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], BaseException | None]) -> None:
    """Let update number `when` (of all runners together) raise."""
    plain, made = Runner.advance, [0]

    def advance(self: Runner) -> None:
        made[0] += 1
        problem = when(made[0])
        if problem is not None:
            raise problem
        plain(self)

    monkeypatch.setattr(Runner, "advance", advance)


def test_ctrl_c_keeps_what_was_measured_and_the_trial_is_run_again(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, lambda n: KeyboardInterrupt() if n == 8 else None)  # within the third trial
    assert search("--trials", "5") == 130
    assert Path("result/report.html").exists()
    assert "The same command goes on from here." in capsys.readouterr().out
    states = [t.state for t in trials()]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.WAITING]
    given_back = trials()[2].params
    assert search("--trials", "5") == 0
    assert len(trials()) == 5 and trials()[2].params == given_back and trials()[2].state == TrialState.COMPLETE


def test_diverged_trials_have_no_result_and_are_told(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, lambda n: Diverged("the loss was nan at update 2") if n == 2 else None)
    assert search("--trials", "3") == 0
    assert "Best of 3 trials, 1 of them without a result: training error" in capsys.readouterr().out
    assert "diverged: the loss was nan at update 2" in Path("result/report.html").read_text()
    assert trials()[0].state == TrialState.FAIL


def test_a_search_without_any_result_exits_1(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, lambda n: RuntimeError("no memory"))
    assert search("--trials", "2") == 1
    assert "RuntimeError: no memory" in Path("result/report.html").read_text()


class Threads:
    """Workers in this process."""

    def __init__(self) -> None:
        self.pool, self.task = ThreadPoolExecutor(2), tiny_task()

    def submit(self, budget: Budget, values: dict[str, Any]) -> Future:
        return self.pool.submit(train, self.task, budget, values)

    def stop(self) -> None:
        self.pool.shutdown()


def test_workers_finish_as_many_trials_and_none_twice() -> None:
    space, budget = spaces.space_of("sgd"), Budget("sgd", None, 2, 0, "tanh")
    studies = []
    for jobs in (1, 2):
        study = searching.open_study(optuna.storages.InMemoryStorage(), "s", "curves", budget, space)
        study.sampler = searching.make_sampler("biased", study, space, 7, 0)
        run, workers = searching.Search(study, "biased", space, budget, 7), Threads()
        assert not (run.run(workers.task) if jobs == 1 else run.run_in(cast(Any, workers), jobs))
        studies.append(study)
    alone, together = studies
    assert [t.state for t in together.trials] == [TrialState.COMPLETE] * 7
    assert len({t.params["lr"] for t in together.trials}) == 7
    assert together.trials[0].params == alone.trials[0].params
    assert together.trials[0].value == pytest.approx(alone.trials[0].value, rel=1e-5)


@pytest.mark.slow
def test_workers_are_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "digits", *SHORT, "--trials", "4", "--jobs", "2", "--storage", "memory", "--out", "r"]
    assert cli.run(arguments) == 0
    found = json.loads(Path("r/trials.json").read_text())["trials"]
    assert [t["state"] for t in found] == ["complete"] * 4 and {t["updates"] for t in found} == {3}


class Stuck:
    """Workers that never finish; the second trial is answered by Ctrl-C."""

    def __init__(self) -> None:
        self.futures: list[Future] = []
        self.stopped = False

    def submit(self, budget: Budget, values: dict[str, Any]) -> Future:
        self.futures.append(Future())
        if len(self.futures) == 2:
            self.futures[0].set_result({"error": 1.0, "test_error": 1.0, "updates": 1, "seconds": 0.1, "failure": ""})
            signal.raise_signal(signal.SIGINT)
        return self.futures[-1]

    def stop(self) -> None:
        self.stopped = True


def test_ctrl_c_stops_the_workers_and_gives_their_trials_back() -> None:
    space, budget = spaces.space_of("sgd"), Budget("sgd", None, 1, 0, "tanh")
    study = searching.open_study(optuna.storages.InMemoryStorage(), "s", "curves", budget, space)
    study.sampler = searching.make_sampler("biased", study, space, 9, 0)
    workers: Any = Stuck()
    assert searching.Search(study, "biased", space, budget, 9).run_in(workers, 2, poll=0.01)
    assert workers.stopped
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.WAITING]


@pytest.mark.parametrize("optimizer", spaces.names())
def test_every_optimizer_with_a_space_trains_in_the_middle_of_it(optimizer: str) -> None:
    assert optimizer in optimizers.names()
    if optimizer == "soap":
        pytest.importorskip("pytorch_optimizer", reason="SOAP comes with the extra 'bench'")
    space = spaces.space_of(optimizer)
    domain = Domain(space)
    values = domain.external(domain.draw(np.full((1, len(space)), 0.5))[0])
    from natgrad_lab import data

    found = train(data.load("digits", train=60, test=20), Budget(optimizer, None, 2, 0, "tanh"), values)
    assert found["failure"] == "" and found["updates"] == 2 and 0.0 < found["error"] < 1e3


def test_sampled_values_reach_the_optimizer() -> None:
    assert spaces.settings_of({"lr": 0.1, "damping.start": 2.0, "damping.ratio": 3.0}) == {
        "lr": 0.1,
        "damping": {"start": 2.0, "ratio": 3.0},
    }
    budget = Budget("sgd", None, 5, 0, "tanh")
    slow, fast = (train(tiny_task(), budget, {"lr": lr, "batch_size": 30})["error"] for lr in (1e-4, 1e-1))
    assert fast < 0.95 * slow


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints; exit code 2."""
    assert cli.run(["search", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("natgrad: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["curvs"], "unknown task 'curvs'. Did you mean 'curves'?"),
        ([], "Missing argument 'TASK'"),
        (["curves", "--sampler", "biassed"], "unknown sampler 'biassed'. Did you mean 'biased'? Known: biased, random"),
        (["curves", "--optimizer", "adm"], "unknown optimizer 'adm'. Did you mean 'adam'?"),
        (["curves", "--trials", "0"], "--trials is 0; it must be a positive number"),
        (["curves", "--jobs", "-1"], "--jobs is -1"),
        (["curves", "--seconds", "nan"], "--seconds is nan"),
        (["curves", "--seconds", "1", "--updates", "3"], "--seconds and --updates exclude each other"),
        (["curves", "--seed", "-1"], "--seed is -1"),
        (["curves", "--storage", "missing/folder/x.db"], "the storage 'missing/folder/x.db' cannot be opened"),
        (["curves", "--storage", "nosql://host/x"], "the storage 'nosql://host/x' cannot be opened"),
        (["curves", "--storage", "postgresql://u@127.0.0.1:1/x"], "cannot be opened"),
        (["curves", "--storage", "text.db"], "the storage 'text.db' cannot be opened"),
        (["curves", "--out", "text.db/results"], "cannot write to the output folder"),
        (["curves", "--storage", "other.db", "--study", "mine"], "the study 'mine' was not made by natgrad search"),
        (["curves", "--storage", "other.db", "--updates", "9"], "has updates 3, not 9"),
        (["curves", "--storage", "other.db", "--updates", "3", "--seed", "4"], "has seed 0, not 4"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    tiny: None, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    Path("text.db").write_text("This is a text, and not a database at all. " * 50)
    optuna.create_study(storage="sqlite:///other.db", study_name="mine").optimize(lambda trial: 1.0, n_trials=1)
    if "other.db" in arguments and "mine" not in arguments:
        assert search("--trials", "1", "--storage", "other.db") == 0
        capsys.readouterr()
    assert expected in refused(capsys, *arguments)


def test_an_optimizer_without_a_space_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no search space is known for 'newton'; there is one for sgd, nesterov"):
        spaces.space_of("newton")
