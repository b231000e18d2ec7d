"""The comparisons of methods in [THESIS]: figures 6.1 and 6.2, and the classifier of sec. 4.3.

Every method has its settings found by biased random search. The best ones are then trained for longer, and the best of
those is what is plotted.
"""

import math
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from natgrad_lab.recipes.base import Size, recipe
from natgrad_lab.recipes.run import Run
from natgrad_lab.recipes.thesis_training import Task, load_task, train
from natgrad_lab.search import BiasedRandomSampler
from natgrad_lab.search.study import quiet

# Logarithmic domains of the search.
INIT = {"init": [0.5, 5.0]}
SGD = {"optimizer": "sgd", "norm": None, "space": {**INIT, "lr": [3e-3, 0.1]}}
CENTERED = {**SGD, "optimizer": "centered"}
MEAN_ONLY = {**SGD, "norm": "mean-only"}
BATCH_NORM = {**SGD, "norm": "batch"}
KFAC = {"optimizer": "kfac", "norm": None, "space": {**INIT, "lr": [1e-2, 1.0], "damping": [0.03, 10.0]}}
ACP = {"optimizer": "acp", "norm": None, "space": {**INIT, "lr": [1e-2, 1.0], "damping": [0.03, 10.0]}}
ACP_FIXED = {**ACP, "space": {**INIT, "lr": [1e-2, 1.0], "damping": [0.03, 10.0], "alpha": [0.1, 10.0]}}

# Cross-entropies have smaller gradients than squared errors.
RATES = {**INIT, "lr": [1e-2, 1.0]}
CLASSIFIERS = {
    "SGD": {**SGD, "space": RATES},
    "batch norm": {**BATCH_NORM, "space": RATES},
    "KFAC": {**KFAC, "space": {**RATES, "damping": [1e-3, 1.0]}},
    "ACP": {**ACP, "space": {**RATES, "damping": [1e-3, 1.0]}},
    "ACP, fixed α": {**ACP, "space": {**RATES, "damping": [1e-3, 1.0], "alpha": [1e-2, 1.0]}},
}

# Printed: batches and statistics of 200, N = 100. The network is sec. 4.2's with all but the code at a quarter of their
# units, and all times are short.
AUTOENCODER = {
    "data": "mnist",
    "side": 14,
    "cases": None,
    "classify": False,
    "hidden": [250, 125, 60, 30, 60, 125, 250],
    "units": "tanh",
    "batch": 200,
    "every": 100,
    "watched": 2000,
    "trials": 10,
    "trial seconds": 4.0,
    "finalists": 1,
    "seconds": 25.0,
    "marks": 25,
}
CLASSIFIER = {
    **AUTOENCODER,
    "data": "cifar10",
    "side": 32,
    "classify": True,
    "hidden": [256, 256, 256],
    "units": "relu",
    "trials": 8,
    "trial seconds": 5.0,
    "seconds": 25.0,
}
DIGITS = {
    "data": "digits",
    "side": 8,
    "cases": 600,
    "hidden": [20, 8, 20],
    "watched": 200,
    "every": 20,
    "trials": 3,
    "trial seconds": 0.1,
    "seconds": 0.3,
    "marks": 3,
}


def compare(run: Run) -> None:
    """Search and train all methods of the configuration."""
    task = load_task(run)
    for name, method in run.configuration["methods"].items():
        _compare_one(run, task, name, method)


def _compare_one(run: Run, task: Task, name: str, method: dict[str, Any]) -> None:
    c = run.configuration
    space: dict[str, BaseDistribution] = {
        key: FloatDistribution(*ends, log=True) for key, ends in method["space"].items()
    }
    word = np.random.SeedSequence([run.seed, *name.encode()]).generate_state(1)[0]
    with quiet():
        study = optuna.create_study(sampler=BiasedRandomSampler(int(word)))
        for t in range(c["trials"]):
            trial = study.ask(space)
            part = f"{name}, trial {t + 1}"
            found = run.part(
                part,
                lambda part=part, settings=trial.params: train(
                    run, task, part, method, settings, seconds=c["trial seconds"], marks=min(5, c["marks"])
                ),
            )
            failed = found["end"] == "diverged"
            study.tell(trial, None if failed else found["train"][-1], state=TrialState.FAIL if failed else None)
    best = sorted(
        (t for t in study.get_trials(deepcopy=False) if t.value is not None), key=lambda t: t.value or math.inf
    )
    for place, trial in enumerate(best[: c["finalists"]], 1):
        part = f"{name}, best {place}"
        run.part(
            part,
            lambda part=part, settings=trial.params: train(
                run, task, part, method, settings, seconds=c["seconds"], marks=c["marks"]
            ),
        )


@recipe(
    "thesis-fig6.1",
    title="centred gradient and mean-only batch norm",
    source="[THESIS, fig. 6.1]",
    full=Size(
        300, {**AUTOENCODER, "methods": {"SGD": SGD, "centred SGD": CENTERED, "mean-only batch norm": MEAN_ONLY}}
    ),
    quick=Size(5, DIGITS),
)
def figure_6_1(run: Run) -> None:
    """Centring the gradient, centring the activations, and neither: loss against time."""
    compare(run)


@recipe(
    "thesis-fig6.2",
    title="approximate second-order methods",
    source="[THESIS, fig. 6.2]",
    full=Size(
        500,
        {
            **AUTOENCODER,
            "methods": {"SGD": SGD, "batch norm": BATCH_NORM, "KFAC": KFAC, "ACP": ACP, "ACP, fixed α": ACP_FIXED},
        },
    ),
    quick=Size(8, DIGITS),
)
def figure_6_2(run: Run) -> None:
    """K-FAC and both kinds of ACP beside batch normalisation and SGD: loss against time."""
    compare(run)


@recipe(
    "thesis-sec4.3",
    title="the same methods on a CIFAR-10 classifier",
    source="[THESIS, sec. 4.3]",
    full=Size(500, {**CLASSIFIER, "methods": CLASSIFIERS}),
    quick=Size(8, {**DIGITS, "hidden": [20, 20]}),
)
def section_4_3(run: Run) -> None:
    """A multilayer perceptron of rectifiers that names what is in an image."""
    compare(run)
