"""Training runs of [KFAC, sec. 13], each with its own checkpoints: killed at any moment, it goes on."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import natgrad as ng
from natgrad.optim.settings import Damping, Rescaling
from natgrad_lab import checkpoint, data, optimizers
from natgrad_lab.recipes.run import Run
from natgrad_lab.records import Evaluation, from_record, read_lines
from natgrad_lab.train import RECORDS, Plan, Session

SAVE_EVERY = 120.0  # seconds between checkpoints


def load_task(run: Run, name: str) -> data.Task:
    """A task, with as many cases as the configuration says (None: all)."""
    cases = run.configuration["cases"]
    task = data.load(name, folder=run.data, train=cases, test=cases)
    if run.device.type != "cpu":
        from dataclasses import replace

        x, test = task.x_train.to(run.device), task.x_test.to(run.device)
        task = replace(task, x_train=x, y_train=x, x_test=test, y_test=test)
    return task


def session(
    run: Run, task: data.Task, name: str, method: Mapping[str, Any], updates: int, *, seed: int | None = None
) -> Session:
    """The training run `name`, new or from its last checkpoint, until `updates` or the configured seconds.

    Args:
        run: Of the recipe: seed, activation, l2.
        task: What to train on.
        name: Of the run's folder.
        method: "optimizer", a name of the registry; "m", a fixed batch size, or None for that of the registry's recipe
            (for K-FAC the growing one); "whole inverses" for K-FAC without low rank, "one alpha" without coefficients
            of single layers; what else there is goes to the optimiser, such as "structure" and "momentum".
        updates: How many.
        seed: Of parameters, batches and sampling. None: the run's.
    """
    c = run.configuration
    seed = run.seed if seed is None else seed
    plan = Plan(task.name, method["optimizer"], c["seconds"], updates, seed, c["activation"])
    folder = run.place(name)
    again = (folder / checkpoint.NAME).exists() or (folder / checkpoint.PREVIOUS).exists()
    return Session(task, plan, folder, resume=again, make=_maker(method, c["l2"]))


def train(
    run: Run,
    task: data.Task,
    name: str,
    method: Mapping[str, Any],
    updates: int | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Any]:
    """Train to the end; returns the columns of its evaluations.

    Raises:
        KeyboardInterrupt: at Ctrl-C, after a checkpoint.
    """
    updates = run.configuration["updates"] if updates is None else updates
    training = session(run, task, name, method, updates, seed=seed)
    with run.bar(name, updates) as advance:
        for _ in range(training.runner.update):
            advance()
        result = training.run(save_every=SAVE_EVERY, updated=lambda runner: advance())
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    evaluations = _evaluations(training.folder)
    columns = ("update", "examples", "cpu_seconds", "train_error", "test_error")
    return {"end": result.reason, **{key: [asdict(e)[key] for e in evaluations] for key in columns}}


def _evaluations(folder: Path) -> list[Evaluation]:
    return [from_record(Evaluation, r) for r in read_lines(folder / RECORDS) if r.get("kind") == "evaluation"]


# What this module reads of a method; the rest are arguments of the optimiser.
_OURS = ("optimizer", "m", "whole inverses", "one alpha")


def _maker(method: Mapping[str, Any], l2: float) -> Callable[..., optimizers.Competitor]:
    def make(name: str, task: Any, model: Any, *, seed: int) -> optimizers.Competitor:
        settings = {key: value for key, value in method.items() if key not in _OURS}
        if method.get("whole inverses"):
            settings["damping"] = Damping(form=ng.FactoredTikhonov())
        if method.get("one alpha"):
            settings["rescaling"] = Rescaling(layers=False)
        if name.startswith("kfac"):
            settings["l2"] = l2
        made = optimizers.make(name, task, model, seed=seed, settings=settings)
        if method["m"] is not None:
            m = min(method["m"], len(task.x_train))
            made.batch_size = lambda k: m
        return made

    return make
