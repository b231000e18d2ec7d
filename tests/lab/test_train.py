"""A run continues bit for bit after a kill at any moment, and never from a damaged checkpoint."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.tiny import competitor, tiny_task
from torch import Tensor, nn

from natgrad_lab import checkpoint, optimizers, train
from natgrad_lab.records import read_lines
from natgrad_lab.train import Plan, Session


def session(folder: Path, updates: int | None = 20, *, resume: bool = False, **arguments: Any) -> Session:
    folder.mkdir(exist_ok=True)
    plan = Plan("tiny", "adam", updates=updates, seed=1)
    return Session(tiny_task(), plan, folder, resume=resume, make=small_batches, **arguments)


def small_batches(name: str, task: Any, model: nn.Module, *, seed: int) -> optimizers.Competitor:
    return optimizers.make(name, task, model, seed=seed, settings={"batch_size": 20})


class Noisy(nn.Module):
    """Adds noise from PyTorch's global stream to its input while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def state_of(s: Session) -> dict[str, Tensor]:
    tensors = {f"model.{k}": v for k, v in s.runner.competitor.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in s.runner.average.state_dict().items()}
    for i, entry in s.runner.competitor.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in entry.items()}
    return tensors


def assert_same(a: Session, b: Session) -> None:
    left, right = state_of(a), state_of(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert a.runner.batches.state_dict() == b.runner.batches.state_dict()
    assert (a.runner.update, a.runner.examples) == (b.runner.update, b.runner.examples)


def without_times(folder: Path) -> list[dict[str, Any]]:
    lines = read_lines(folder / "records.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


@pytest.mark.parametrize("stop", [1, 4, 7, 19])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = session(tmp_path / "whole")
    assert whole.run().reason == "finished"
    session(tmp_path / "parts", updates=stop).run()
    second = session(tmp_path / "parts", resume=True)
    assert second.runner.update == stop
    assert second.run().update == 20
    assert_same(whole, second)
    scheduled = without_times(tmp_path / "whole")
    updates = {record["update"] for record in scheduled}  # the first part also evaluates where it ends
    assert scheduled == [record for record in without_times(tmp_path / "parts") if record["update"] in updates]


def test_global_random_numbers_continue_and_are_given_back(tmp_path: Path) -> None:
    def build(folder: Path, updates: int, resume: bool = False) -> Session:
        task = tiny_task()
        plain = task.make_model
        task.make_model = lambda **arguments: nn.Sequential(Noisy(), plain(**arguments))
        folder.mkdir(exist_ok=True)
        return Session(task, Plan("tiny", "adam", updates=updates), folder, resume=resume, make=small_batches)

    before = torch.get_rng_state()
    whole = build(tmp_path / "whole", 12)
    whole.run()
    build(tmp_path / "parts", 5).run()
    torch.rand(3)
    second = build(tmp_path / "parts", 12, resume=True)
    second.run()
    assert_same(whole, second)
    torch.set_rng_state(before)


def test_killed_run_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    """The process is gone between two checkpoints: what came after the last one is done again, identically."""
    whole = session(tmp_path / "whole")
    whole.run()
    killed = session(tmp_path / "killed")

    def die(runner: Any) -> None:
        if runner.update == 6:
            killed.save()
        if runner.update == 11:
            raise SystemExit("killed")

    with pytest.raises(SystemExit):
        killed.run(updated=die, save_every=1e9)
    with open(tmp_path / "killed" / "records.jsonl", "a") as file:
        file.write('{"kind": "evaluation", "upd')  # and a line was half written
    (tmp_path / "killed" / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    second = session(tmp_path / "killed", resume=True)
    assert second.runner.update == 6
    second.run()
    assert_same(whole, second)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")


def test_real_kill_between_any_two_system_calls(tmp_path: Path) -> None:
    """A child process saves without pause and is killed; what it leaves can always be read."""
    for delay in (0.02, 0.05, 0.11):
        folder = tmp_path / str(delay)
        folder.mkdir()
        state = {"format": train.FORMAT, "x": torch.arange(5000.0)}
        checkpoint.save(folder, state)
        child = os.fork()
        if child == 0:
            try:
                while True:
                    checkpoint.save(folder, state)
            finally:
                os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert torch.equal(checkpoint.load(folder)["x"], state["x"])


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "other file", "gone"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    whole = session(tmp_path / "whole")
    whole.run()
    first = session(tmp_path / "run", updates=6)
    first.run()
    second = session(tmp_path / "run", updates=9, resume=True)
    second.run()
    path = tmp_path / "run" / "checkpoint.pt"
    spoil(path, damage)
    warnings: list[str] = []
    third = session(tmp_path / "run", resume=True, warn=warnings.append)
    assert third.runner.update == 6
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert "checkpoint.previous.pt" in warnings[0]
    third.run()
    assert_same(whole, third)


def spoil(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "one bit":
        at = data.find(b"data/0") + 200  # inside a tensor's bytes: the pickle still loads
        data[at] ^= 16
        path.write_bytes(data)
    else:
        path.write_bytes({"cut short": bytes(data[: len(data) // 2]), "empty": b"", "other file": b"hello"}[damage])


def test_both_checkpoints_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    session(tmp_path / "run", updates=3).run()
    session(tmp_path / "run", updates=6, resume=True).run()
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        spoil(tmp_path / "run" / name, "cut short")
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt.*checkpoint\.previous\.pt.*without --resume"):
        session(tmp_path / "run", resume=True)


def test_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"format": train.FORMAT, "model": nn.Linear(2, 2)}, tmp_path / "checkpoint.pt")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run in"):
        Plan.read(tmp_path / "nowhere")
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path)


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    session(tmp_path / "run", updates=2).run()
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        session(tmp_path / "run", updates=2)


def test_other_data_and_other_settings_are_refused(tmp_path: Path) -> None:
    session(tmp_path / "run", updates=2).run()
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="other data"):
        Session(tiny_task(train=80), Plan("tiny", "adam", updates=4, seed=1), folder, resume=True, make=small_batches)
    with pytest.raises(ValueError, match="seed 1, not 2"):
        Session(tiny_task(), Plan("tiny", "adam", updates=4, seed=2), folder, resume=True, make=small_batches)


def test_ctrl_c_saves_after_the_update(tmp_path: Path) -> None:
    whole = session(tmp_path / "whole")
    whole.run()
    stopped = session(tmp_path / "stopped")

    def press(runner: Any) -> None:
        if runner.update == 8:
            os.kill(os.getpid(), signal.SIGINT)

    result = stopped.run(updated=press)
    assert (result.reason, result.update) == ("interrupted", 8)
    second = session(tmp_path / "stopped", resume=True)
    second.run()
    assert_same(whole, second)


def test_divergence_ends_the_run_and_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    def make(name: str, task: Any, model: nn.Module, *, seed: int) -> optimizers.Competitor:
        made = competitor(name, task, model, lambda x, y: torch.tensor(float("inf" if s.runner.update == 4 else 1.0)))
        return made

    folder = tmp_path / "run"
    folder.mkdir()
    s = Session(tiny_task(), Plan("tiny", "sgd", updates=9), folder, make=make)
    result = s.run(save_every=1e-9)
    assert result.reason == "diverged"
    assert "inf at update 5" in result.message
    assert checkpoint.load(folder)["runner"]["update"] == 4


def test_seconds_of_both_parts_add_up(tmp_path: Path) -> None:
    def timed(seconds: float, resume: bool) -> Session:
        tmp_path.mkdir(exist_ok=True)
        plan = Plan("tiny", "adam", seconds=seconds, seed=1)
        return Session(tiny_task(), plan, tmp_path, resume=resume, make=small_batches)

    timed(0.1, False).run()
    second = timed(0.2, True)
    assert 0.1 <= second.runner.clock.seconds < 0.19
    second.run()
    assert 0.2 <= second.runner.clock.seconds < 0.29


def test_plan_survives_in_the_folder(tmp_path: Path) -> None:
    session(tmp_path / "run", updates=2)
    plan = Plan.read(tmp_path / "run")
    assert plan == Plan("tiny", "adam", updates=2, seed=1)
    assert train.continued(plan, None, None) == plan
    assert train.continued(plan, None, 7).updates == 7
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json cannot be read"):
        Plan.read(tmp_path / "run")
