"""The long recipes of [KFAC]: stopped training goes on as if it had not stopped, and what is read off is right."""

from pathlib import Path
from typing import Any

import pytest
import torch

from natgrad_lab.figures.kfac_experiments import _last, progress_gain, updates_to
from natgrad_lab.recipes.base import find
from natgrad_lab.recipes.kfac_experiments import best_step_within
from natgrad_lab.recipes.kfac_training import load_task, train
from natgrad_lab.recipes.run import Run
from natgrad_lab.runner import Runner


def test_stopped_training_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = {"optimizer": "kfac-paper", "structure": "block_tridiagonal", "m": 50}

    def columns(folder: str, stops: bool) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        run = Run(find("kfac-fig10"), tmp_path / folder, quick=True)
        task = load_task(run, "digits")
        assert len(task.x_train) == 300
        if not stops:
            return train(run, task, "part", method, 12)
        plain = Runner.advance

        def advance(self: Runner) -> None:
            plain(self)
            if self.update == 7:
                import signal

                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Runner, "advance", advance)
            train(run, task, "part", method, 12)
        return train(Run(find("kfac-fig10"), tmp_path / folder, quick=True), task, "part", method, 12)

    whole, stopped = columns("whole", False), columns("stopped", True)
    assert whole["update"] == stopped["update"] and whole["update"][-1] == 12
    assert whole["train_error"] == stopped["train_error"]
    assert whole["examples"] == [50 * u for u in whole["update"]]


def test_best_step_is_the_minimiser_of_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    F, gradient, one, other = root @ root.T, *torch.randn(3, 5, generator=generator, dtype=torch.float64)
    step = best_step_within(F, gradient, [one, other], damping=0.3)
    slope = gradient + F @ step + 0.3 * step
    assert abs(slope @ one) < 1e-10 and abs(slope @ other) < 1e-10
    assert torch.linalg.matrix_rank(torch.stack([step, one, other])) == 2


def test_updates_to_an_error_are_interpolated_on_the_logarithm() -> None:
    found = {"update": [0, 10, 20], "train_error": [100.0, 10.0, 1.0]}
    assert updates_to(found, 10.0) == pytest.approx(10)
    assert updates_to(found, 10.0**1.5) == pytest.approx(5)
    assert updates_to(found, 10.0**0.5) == pytest.approx(15)
    assert updates_to(found, 200.0) == 0
    assert updates_to(found, 0.5) is None


def test_progress_gain_is_the_ratio_of_updates_less_one() -> None:
    updates = list(range(0, 130, 10))
    slower = {"update": updates, "train_error": [100 * 0.9 ** (u / 1.3) for u in updates]}
    faster = {"update": updates, "train_error": [100 * 0.9**u for u in updates]}
    assert progress_gain(slower, faster) == pytest.approx(0.3)
    assert progress_gain(slower, {"update": [0, 10], "train_error": [100.0, None]}) is None


def test_last_error_tells_of_a_run_that_lost_its_least_one() -> None:
    found = {"end": "finished", "update": [0, 10, 20], "train_error": [9.0, 4.0, 4.2]}
    assert _last(found) == "4.2 after 20"
    assert _last({**found, "train_error": [9.0, 4.0, 54.9]}) == "54.9 after 20; least 4 after 10"
    assert (
        _last({**found, "end": "diverged", "train_error": [9.0, 4.0, None]}) == "– after 20, diverged; least 4 after 10"
    )
