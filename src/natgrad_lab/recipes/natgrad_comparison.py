"""Figures 2, 4 and 5 and table 1 of [NATGRAD]: what the metric is computed on, and what that does to the test error."""

import re
from collections.abc import Mapping
from typing import Any

from natgrad_lab.recipes import natgrad_problems as problems
from natgrad_lab.recipes.base import Size, find, recipe
from natgrad_lab.recipes.natgrad_training import Problem, train
from natgrad_lab.recipes.run import RECORD, Record, Run
from natgrad_lab.records import finite

# As in the legends of the paper.
MSGD, UNLABELLED = "MSGD", "KL, unlabelled"
DIFFERENT, SAME, COVARIANCE = "KL, different batch", "KL, same batch", "covariance"
# Not in the paper: unlabelled inputs with the settings of the other two, to tell the inputs from the settings.
CONTROL = "KL, unlabelled, damping 0.01"

# Algorithm 1: 20 iterations. The Levenberg-Marquardt rule only where "adapts".
NATURAL = {"iterations": 20, "adapts": False, "decay": None}


def methods(common: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of each method: those of all, and its own."""
    return {name: {**common, **settings} for name, settings in own.items()}


FEW = {
    MSGD: {"metric": "none", "lr": 1.0},
    UNLABELLED: {"metric": "unlabelled", "lr": 0.3, "damping": 2.0, "adapts": True},
    DIFFERENT: {"metric": "different", "lr": 0.1, "damping": 0.01},
    SAME: {"metric": "same", "lr": 0.1, "damping": 0.01},
    CONTROL: {"metric": "unlabelled", "lr": 0.1, "damping": 0.01},
    COVARIANCE: {"metric": "covariance", "lr": 1.0, "damping": 0.1},
}


@recipe(
    "natgrad-fig4",
    title="few digits: what the metric is made of",
    source="[NATGRAD, fig. 4]",
    full=Size(
        5200,
        {
            "data": "mnist",
            "side": 28,
            "cases": 5000,
            "test cases": 10_000,
            "hidden": [1500],
            "runs": 3,
            "methods": methods(
                {**NATURAL, "batch": 1000, "metric batch": 1000, "updates": 120, "every": 10},
                {**FEW, MSGD: {**FEW[MSGD], "batch": 250, "updates": 2400, "every": 200}},
            ),
        },
    ),
    quick=Size(
        4,
        {
            "data": "digits",
            "side": 8,
            "cases": 300,
            "test cases": None,
            "hidden": [40],
            "runs": 1,
            "methods": methods({**NATURAL, "batch": 100, "metric batch": 100, "updates": 6, "every": 2}, FEW),
        },
    ),
)
def figure_4(run: Run) -> None:
    """Train and test error over the updates, for every method."""
    _several(run, problems.restricted(run))


MANY = {
    DIFFERENT: {"metric": "different", "lr": 0.5, "damping": 5.0, "adapts": True, "guard": True},
    SAME: {"metric": "same", "lr": 1.0, "damping": 5.0, "adapts": True, "guard": True},
    COVARIANCE: {"metric": "covariance", "lr": 1.0, "damping": 0.1},
}


@recipe(
    "natgrad-fig5",
    title="all digits, with a convolutional network",
    source="[NATGRAD, fig. 5]",
    full=Size(
        4000,
        {
            "data": "mnist",
            "side": 28,
            "cases": 60_000,
            "filters": [[16, 5, 2], [32, 5, 2]],  # number, size, stride
            "hidden": [200],
            "runs": 2,
            "methods": methods(
                {**NATURAL, "batch": 1000, "metric batch": 1000, "updates": 300, "every": 20, "decay": [200, 20]}, MANY
            ),
        },
    ),
    quick=Size(
        4,
        {
            "data": "digits",
            "side": 8,
            "cases": 400,
            "filters": [[4, 3, 1], [6, 3, 2]],
            "hidden": [20],
            "runs": 1,
            "methods": methods(
                {**NATURAL, "batch": 100, "metric batch": 100, "updates": 5, "every": 1, "decay": [3, 2]}, MANY
            ),
        },
    ),
)
def figure_5(run: Run) -> None:
    """Train and test error over the updates."""
    _several(run, problems.digits(run))


def _several(run: Run, problem: Problem) -> None:
    """Every method from several initial weights, each with batches of its own."""
    for number in range(run.configuration["runs"]):
        for name, method in run.configuration["methods"].items():
            part = f"{name}, run {number + 1}"
            run.part(part, lambda p=part, m=method, k=number: train(run, problem, p, m, run.seed + k))


def method_of(part: str) -> str:
    """The method that "METHOD, run 2" and "METHOD, split 2" are runs of."""
    return re.split(r", (?:run|split) \d+$", part)[0]


FACES = {
    UNLABELLED: {"metric": "joined", "lr": 1.0, "damping": 8.0, "adapts": True, "guard": True},
    SAME: {"metric": "same", "lr": 1.0, "damping": 8.0, "adapts": True, "guard": True},
}


@recipe(
    "natgrad-fig2",
    title="faces: a metric with unlabelled inputs",
    source="[NATGRAD, fig. 2]",
    full=Size(
        120,
        {
            "data": "faces",
            "side": 32,
            "given": 3,
            "unlabelled": 4,
            "splits": 3,
            "filters": [[16, 12, 2]],
            "hidden": [128, 64],
            "methods": methods(
                {**NATURAL, "batch": 80, "metric batch": 40, "updates": 40, "every": 4, "decay": [30, 20]}, FACES
            ),
        },
    ),
    quick=Size(
        4,
        {
            "data": "digits",
            "side": 8,
            "splits": 2,
            "filters": [[4, 3, 1]],
            "hidden": [16, 12],
            "methods": methods(
                {**NATURAL, "batch": 20, "metric batch": 10, "updates": 4, "every": 1, "decay": [2, 2]}, FACES
            ),
        },
    ),
)
def figure_2(run: Run) -> None:
    """Train and test error over the updates, for several divisions of the photographs."""
    for split in range(run.configuration["splits"]):
        problem = problems.faces(run, run.seed + split)
        for name, method in run.configuration["methods"].items():
            part = f"{name}, split {split + 1}"
            run.part(part, lambda p=part, m=method, s=split, d=problem: train(run, d, p, m, run.seed + s))


@recipe(
    "natgrad-table1",
    title="what figures 2, 4 and 5 end with",
    source="[NATGRAD, table 1]",
    full=Size(9900, {"figures": ["natgrad-fig4", "natgrad-fig5", "natgrad-fig2"]}),
    quick=Size(9, {}),
)
def table_1(run: Run) -> None:
    """The last errors of the three figures, from their finished records where they lie beside this run, else made."""
    for name in run.configuration["figures"]:
        run.part(name, lambda n=name: _ends(_finished(run, n)))


def _finished(run: Run, name: str) -> Record:
    """The record of a figure with this run's seed and size."""
    asked = {"recipe": name, "quick": run.quick, "seed": run.seed}
    asked["configuration"] = finite(find(name).configuration(run.quick))
    beside = run.folder.parent / (name + ("-quick" if run.quick else ""))
    if (beside / RECORD).exists():
        found = Record.read(beside)
        if found.finished and all(found.content[key] == value for key, value in asked.items()):
            return found
    return Run(
        find(name),
        run.place(name),
        quick=run.quick,
        seed=run.seed,
        data=run.data,
        device=str(run.device),
        bar=run.bar,
    ).execute()


def _ends(record: Record) -> dict[str, Any]:
    """The last errors of every method, one of each run."""
    found: dict[str, Any] = {}
    for part, columns in record.results.items():
        ends = found.setdefault(method_of(part), {"train": [], "test": []})
        for kind, values in ends.items():
            values.append(columns[kind][-1])
    return {"started": record.content["started"], "methods": found}
