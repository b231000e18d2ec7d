"""The command line does its work, and answers what it cannot do with one line and exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab.tiny import load_tiny

import natgrad
from natgrad_lab import cli
from natgrad_lab.checkpoint import NAME, PREVIOUS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny task in place of CURVES, and a folder of its own to write to."""

    monkeypatch.setattr(cli, "load", load_tiny)
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints; exit code 2."""
    assert cli.run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("natgrad: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_race_writes_records_pictures_and_report(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["race", "curves", "--optimizers", "adam,sgd,adam", "--seconds", "0.3", "--out", "result"]) == 0
    assert {p.name for p in Path("result").iterdir()} == {
        "records.jsonl",
        "error-seconds.png",
        "error-updates.png",
        "report.html",
    }
    out = capsys.readouterr().out
    assert "is ahead with training error" in out
    assert out.rstrip().endswith(f"Report: {Path('result') / 'report.html'}")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert re.search(r"^adam: 0 of 0.3 s, error ", out, re.MULTILINE)  # no terminal: plain lines tell how it goes


def test_race_has_a_folder_of_its_own_by_default(tiny: None) -> None:
    assert cli.run(["race", "--optimizers", "sgd", "--seconds", "0.1"]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("race-curves-")
    assert (folder / "report.html").exists()


def test_ctrl_c_still_writes_the_report(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from natgrad_lab.runner import Runner

    plain = Runner.advance

    def advance(self: Runner) -> None:
        if self.update == 20:
            raise KeyboardInterrupt
        plain(self)

    monkeypatch.setattr(Runner, "advance", advance)
    assert cli.run(["race", "--optimizers", "adam,sgd", "--seconds", "60", "--out", "result"]) == 130
    assert Path("result/report.html").exists()
    assert "adam interrupted after" in capsys.readouterr().out


def test_race_in_which_nothing_works_exits_1(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from natgrad_lab.runner import Diverged, Runner

    def advance(self: Runner) -> None:
        raise Diverged("the loss was nan at update 1")

    monkeypatch.setattr(Runner, "advance", advance)
    assert cli.run(["race", "--optimizers", "sgd", "--seconds", "0.1", "--out", "result"]) == 1


def test_train_stops_and_resumes(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "curves", "--optimizer", "adam", "--updates", "5", "--out", "run"]) == 0
    assert "natgrad train --resume run" in capsys.readouterr().out
    assert cli.run(["train", "curves", "--optimizer", "adam", "--resume", "run", "--updates", "9"]) == 0
    assert "from update 5 on" in capsys.readouterr().out
    assert {p.name for p in Path("run").iterdir()} == {NAME, PREVIOUS, "run.json", "records.jsonl"}


def test_train_falls_back_to_the_previous_checkpoint(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["train", "curves", "--optimizer", "adam", "--updates", "5", "--out", "run"])
    cli.run(["train", "--resume", "run", "--updates", "9"])
    Path("run", NAME).write_bytes(b"rubbish")
    capsys.readouterr()
    assert cli.run(["train", "--resume", "run", "--updates", "9"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("natgrad: warning: the checkpoint run/checkpoint.pt cannot be read")
    assert "from update 5 on" in captured.out
    for name in (NAME, PREVIOUS):
        Path("run", name).write_bytes(b"rubbish")
    line = refused(capsys, "train", "--resume", "run", "--updates", "9")
    assert "run/checkpoint.pt" in line
    assert "without --resume" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["race", "curvs"], "unknown task 'curvs'. Did you mean 'curves'? Known: curves, digits, mnist, faces."),
        (["race", "--optimizers", "adm"], "unknown optimizer 'adm'. Did you mean 'adam'? Known: kfac, kfac-paper"),
        (["race", "--optimizers", ","], "--optimizers is empty"),
        (["race", "--seconds", "-3"], "--seconds is -3; it must be a positive number"),
        (["race", "--seconds", "nan"], "--seconds is nan"),
        (["race", "--seconds", "many"], "Invalid value for '--seconds'"),
        (["race", "--threads", "0"], "--threads is 0"),
        (["race", "--activation", "relu"], "'relu' is not one of 'tanh', 'sigmoid'"),
        (["race", "--speed", "3"], "No such option: --speed"),
        (["rase"], "No such command 'rase'"),
        (["train", "mnst", "--optimizer", "adam"], "unknown task 'mnst'. Did you mean 'mnist'?"),
        (["train", "curves", "--optimizer", "kfak"], "unknown optimizer 'kfak'. Did you mean 'kfac'?"),
        (["train", "curves"], "--optimizer NAME is missing"),
        (["train", "curves", "--optimizer", "adam", "--updates", "-1"], "--updates is -1"),
        (["train", "curves", "--optimizer", "adam", "--seconds", "-1"], "--seconds is -1"),
        (["train", "--resume", "nowhere"], "there is no run in nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    tiny: None, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize("command", [["race"], ["train", "curves", "--optimizer", "sgd"]])
def test_output_folder_that_cannot_be_written(
    tiny: None, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    Path("file").write_text("in the way")
    line = refused(capsys, *command, "--out", "file/run")
    assert "cannot write to the output folder file/run" in line
    assert "choose another with --out" in line


def test_train_refuses_a_folder_in_use_and_another_task(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["train", "curves", "--optimizer", "adam", "--updates", "2", "--out", "run"])
    capsys.readouterr()
    assert "already holds a run" in refused(capsys, "train", "curves", "--optimizer", "adam", "--out", "run")
    assert "task 'curves', not 'digits'" in refused(capsys, "train", "digits", "--resume", "run")
    assert "optimizer 'adam', not 'sgd'" in refused(capsys, "train", "--optimizer", "sgd", "--resume", "run")


def test_missing_data_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "race", "mnist", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert "the data folder" in line
    assert "does not exist" in line


def test_data_error_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = pytest.importorskip("natgrad_lab.data")

    def load(*arguments: Any, **options: Any) -> None:
        raise ValueError("train-images.gz is corrupt:\nchecksum 1, expected 2; download it again")

    monkeypatch.setattr(data, "load", load)
    line = refused(capsys, "race", "mnist", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "train-images.gz is corrupt: checksum 1, expected 2; download it again" in line


def test_installed_command() -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "natgrad_lab.cli", *arguments]
        environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
        return subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment)

    version = call("--version")
    assert version.returncode == 0
    assert version.stdout.startswith(f"natgrad {natgrad.__version__} (torch ")
    refusal = call("race", "curvs")
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr.count("\n") == 1
    for page in (["--help"], ["race", "--help"], ["train", "--help"]):
        shown = call(*page)
        assert shown.returncode == 0
        assert max(len(line) for line in shown.stdout.splitlines()) <= 80
    assert "--resume" in shown.stdout


def test_without_arguments_prints_the_help_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    captured = capsys.readouterr()
    assert "race" in captured.out + captured.err and "natgrad: error" not in captured.err


def test_help_names_every_optimizer() -> None:
    from natgrad_lab.arguments import OPTIMIZERS
    from natgrad_lab.optimizers import names

    assert sorted(OPTIMIZERS) == sorted(names())


def test_help_imports_nothing_that_takes_seconds() -> None:
    heavy = ["torch", "numpy", "scipy", "sklearn", "matplotlib", "optuna"]
    program = (
        f"import sys; from natgrad_lab import cli; code = cli.run(['--help']); "
        f"sys.exit(code or ' '.join(set({heavy}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
