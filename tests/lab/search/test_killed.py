"""A process that is killed in the middle of a trial, and another one that takes its study over."""

import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from natgrad_lab.search import BiasedRandomSampler

TRIALS = 9

SCRIPT = """
import os, signal, sys
import optuna
from natgrad_lab.search import BiasedRandomSampler

def cost(trial):
    x = trial.suggest_float("x", 0.0, 1.0)
    if len(sys.argv) > 2 and trial.number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return abs(x - 0.3)

study = optuna.create_study(storage=sys.argv[1], study_name="s", sampler=BiasedRandomSampler(7), load_if_exists=True)
finished = sum(t.state.is_finished() for t in study.trials)
study.optimize(cost, n_trials=9 - finished)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_study_whose_process_was_killed_continues(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/search.db"

    def run(*arguments: str) -> int:
        command = [sys.executable, "-c", SCRIPT, url, *arguments]
        return subprocess.run(command, capture_output=True).returncode

    assert run("4") == -signal.SIGKILL
    before = optuna.load_study(storage=url, study_name="s").trials
    assert [t.state for t in before] == [TrialState.COMPLETE] * 4 + [TrialState.RUNNING]
    assert run() == 0
    after = optuna.load_study(storage=url, study_name="s").trials
    assert [t.params for t in after[:5]] == [t.params for t in before]
    assert [t.number for t in after if t.state == TrialState.COMPLETE] == [0, 1, 2, 3, *range(5, TRIALS + 1)]
    # The trial that never ended is no result: what follows is proposed as if it were not there.
    study = optuna.create_study(sampler=BiasedRandomSampler(7))
    for t in after[:4]:
        study.add_trial(t)
    study.enqueue_trial({"x": 0.0})
    waiting = study.ask()
    assert waiting.number == 4
    assert study.ask({"x": after[0].distributions["x"]}).params == after[5].params
