"""One run of one optimiser, checkpointed: killed at any moment, it continues bit for bit.

A run's folder holds `run.json` (what was asked for), `records.jsonl` (evaluations) and the checkpoints. Evaluations
come at fixed update numbers, so an interrupted and continued run leaves the same records as an uninterrupted one,
times apart.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from natgrad_lab import checkpoint, optimizers
from natgrad_lab.records import Evaluation, JsonLines, environment, from_record, read_lines, replace_text, write_json
from natgrad_lab.runner import SUBSET, Diverged, Runner
from natgrad_lab.signals import between_updates

FORMAT = "natgrad-train-1"
RUN = "run.json"
RECORDS = "records.jsonl"


@dataclass(frozen=True)
class Plan:
    """What a run does; at least one of `seconds` (of updates, all sessions together) and `updates` ends it."""

    task: str
    optimizer: str
    seconds: float | None = None
    updates: int | None = None
    seed: int = 0
    activation: str = "tanh"

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan of an earlier run.

        Raises:
            ValueError: the folder holds none.
        """
        try:
            return cls(**json.loads((folder / RUN).read_text(encoding="utf-8"))["plan"])
        except FileNotFoundError:
            raise ValueError(
                f"there is no run in {folder}: --resume takes the folder that an earlier natgrad train wrote (--out)"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / RUN} cannot be read ({error}); start again without --resume") from error


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended: `reason` is "finished", "diverged" or "interrupted"."""

    reason: str
    message: str
    update: int
    evaluation: Evaluation | None


class Session:
    """A run, opened or continued, ready to go on.

    Args:
        task: The task that `plan` names.
        plan: What to do.
        folder: The run's folder (existing).
        resume: Whether to continue from the folder's checkpoint.
        make: Makes the competitor; `optimizers.make` unless a test brings its own.
        warn: Told about what is not as it should be but does not stop the run.

    Raises:
        ValueError: nothing to continue, other data, or a folder in use by another run; `CheckpointError` for a
        checkpoint.
    """

    def __init__(
        self,
        task: Any,
        plan: Plan,
        folder: Path,
        *,
        resume: bool = False,
        make: Callable[..., optimizers.Competitor] = optimizers.make,
        warn: Callable[[str], None] = lambda message: None,
        subset: int = SUBSET,
    ) -> None:
        self.plan, self.folder = plan, folder
        self._data = fingerprint(task)
        state = checkpoint.load(folder, warn) if resume else None
        if state is not None:
            self._check_same_run(state, warn)
        model = task.make_model(seed=plan.seed, activation=plan.activation).to(task.x_train.device)
        self.runner = Runner(make(plan.optimizer, task, model, seed=plan.seed), task, seed=plan.seed, subset=subset)
        self.next_evaluation = 0
        self.last: Evaluation | None = None
        if state is None:
            if (folder / checkpoint.NAME).exists() or (folder / checkpoint.PREVIOUS).exists():
                raise ValueError(
                    f"{folder} already holds a run: add --resume {folder} to continue it, or choose another --out"
                )
            write_json(
                folder / RUN, {"plan": asdict(plan), "settings": self.runner.competitor.settings, **environment()}
            )
            (folder / RECORDS).unlink(missing_ok=True)
            self._random = torch.Generator().manual_seed(plan.seed).get_state()
        else:
            self.runner.load_state_dict(state["runner"])
            self.next_evaluation = state["next_evaluation"]
            self._random = state["random"]
            # The update of the checkpoint itself was evaluated before it was saved, or is still to be evaluated.
            update = state["runner"]["update"]
            kept = _forget_after(folder / RECORDS, update if self.next_evaluation > update else update - 1)
            self.last = kept[-1] if kept else None

    def run(
        self,
        *,
        save_every: float = 30.0,
        updated: Callable[[Runner], None] = lambda runner: None,
        evaluated: Callable[[Evaluation], None] = lambda evaluation: None,
    ) -> Result:
        """Train until the plan is done.

        A checkpoint is written every `save_every` seconds, at the end, and at Ctrl-C, which waits for the update.
        PyTorch's global random stream is the run's own meanwhile and is given back afterwards.
        """
        lines = JsonLines(self.folder / RECORDS)
        runner = self.runner
        devices = [runner.clock.device] if runner.clock.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), between_updates() as interrupted:
                torch.set_rng_state(self._random)
                saved = time.monotonic()
                while True:
                    if runner.update >= self.next_evaluation:
                        # A function of the update number alone: a continued run keeps the same schedule.
                        self.next_evaluation = runner.update + max(1, runner.update // 8)
                        self._evaluate(lines, evaluated)
                    if self._done():
                        self._evaluate(lines, evaluated)
                        self.save()
                        return Result("finished", "", runner.update, self.last)
                    try:
                        interrupted()
                    except KeyboardInterrupt:
                        self.save()
                        return Result("interrupted", "stopped by Ctrl-C", runner.update, self.last)
                    runner.clock.start()
                    try:
                        runner.advance()
                    finally:
                        runner.clock.stop()
                    updated(runner)
                    if time.monotonic() - saved >= save_every:
                        runner.check()
                        self.save()
                        saved = time.monotonic()
        except Diverged as problem:
            return Result("diverged", str(problem), runner.update, self.last)
        finally:
            lines.close()

    def save(self) -> None:
        """Write a checkpoint of now."""
        checkpoint.save(
            self.folder,
            {
                "format": FORMAT,
                "plan": asdict(self.plan),
                "data": self._data,
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
                "random": torch.get_rng_state(),
                "next_evaluation": self.next_evaluation,
                "runner": self.runner.state_dict(),
            },
        )

    def _done(self) -> bool:
        plan, runner = self.plan, self.runner
        return (plan.updates is not None and runner.update >= plan.updates) or (
            plan.seconds is not None and runner.clock.seconds >= plan.seconds
        )

    def _evaluate(self, lines: JsonLines, evaluated: Callable[[Evaluation], None]) -> None:
        """Evaluate and record, unless this update was evaluated already."""
        if self.last is not None and self.last.update == self.runner.update:
            return
        self.last = self.runner.evaluate()
        lines.write("evaluation", self.last)
        evaluated(self.last)

    def _check_same_run(self, state: dict[str, Any], warn: Callable[[str], None]) -> None:
        if state["format"] != FORMAT:
            raise checkpoint.CheckpointError(
                f"the checkpoint in {self.folder} has the format {state['format']!r}, expected {FORMAT!r}; continue "
                f"it with the version"
                " of natgrad that wrote it, or start again without --resume"
            )
        for name in ("task", "optimizer", "seed", "activation"):
            before, now = state["plan"][name], getattr(self.plan, name)
            if before != now:
                raise ValueError(
                    f"the run in {self.folder} has {name} {before!r}, not {now!r}; leave it out when resuming"
                )
        if state["data"] != self._data:
            raise ValueError(
                f"the run in {self.folder} was trained on other data of the same name; give the --data folder that "
                f"it was started with"
            )
        for name, now in (("threads", torch.get_num_threads()), ("torch", str(torch.__version__))):
            if state[name] != now:
                warn(f"the run was saved with {name} {state[name]}, now {now}: it continues, but not to the last bit")


def continued(plan: Plan, seconds: float | None, updates: int | None) -> Plan:
    """The plan of a continued run: its own limits unless new ones are given."""
    return plan if seconds is None and updates is None else replace(plan, seconds=seconds, updates=updates)


def fingerprint(task: Any) -> str:
    """A hash of shapes and some rows of the data: enough to notice other data under the same name."""
    digest = hashlib.sha256(repr((tuple(task.x_train.shape), tuple(task.x_test.shape))).encode())
    for x in (task.x_train, task.x_test):
        digest.update(x[:: max(1, len(x) // 256)].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _forget_after(path: Path, update: int) -> list[Evaluation]:
    """Remove the records after the last checkpoint, which the run will write again; returns the evaluations kept."""
    records = read_lines(path) if path.exists() else []
    kept = [record for record in records if record.get("update", 0) <= update]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return [from_record(Evaluation, record) for record in kept if record["kind"] == "evaluation"]
