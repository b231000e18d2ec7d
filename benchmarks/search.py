"""What a proposal of biased random search costs, with 10 000 finished trials in memory.

CPU-milliseconds from `infer_relative_search_space` to the end of `sample_relative`, of one thread; random results of a
bowl, half of the parameters logarithmic. Between two proposals one more trial finishes, as in a search. Optuna's
RandomSampler, which looks at nothing, is timed over the same trials for the overhead that any sampler has.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from benchmarks.measure import cpu_seconds, positive
from benchmarks.report import save, table
from natgrad_lab.search import BiasedRandomSampler
from natgrad_lab.search.space import Domain

TARGET = 1.0  # milliseconds, median
SPACES: dict[str, dict[str, BaseDistribution]] = {
    **{
        f"{d} numbers": {f"p{i:02}": FloatDistribution(1e-4, 1.0, log=i % 2 == 0) for i in range(d)} for d in (2, 5, 10)
    },
    "5 numbers, 2 of 4 choices": {
        **{f"p{i}": FloatDistribution(1e-4, 1.0, log=i % 2 == 0) for i in range(5)},
        **{f"q{i}": CategoricalDistribution(("a", "b", "c", "d")) for i in range(2)},
    },
}


def filled(space: dict[str, BaseDistribution], trials: int) -> optuna.Study:
    """A study in memory with so many results at random points: squared distances to one place."""
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    domain = Domain(space)
    u = np.random.default_rng(0).random((trials, len(space)))
    study.add_trials(
        optuna.trial.create_trial(params=domain.external(point), distributions=space, value=float(cost))
        for point, cost in zip(domain.draw(u), np.square(u - 0.3).sum(axis=1), strict=True)
    )
    return study


def measure(space: dict[str, BaseDistribution], trials: int, proposals: int) -> dict[str, Any]:
    """Milliseconds of each proposal, and of a whole trial with either sampler: ask, suggest, tell."""
    study = filled(space, trials)
    sampler, found = study.sampler, []
    for _ in range(proposals):
        trial = study.ask()
        frozen = study._storage.get_trial(trial._trial_id)

        def propose(frozen: optuna.trial.FrozenTrial = frozen) -> None:
            sampler.sample_relative(study, frozen, sampler.infer_relative_search_space(study, frozen))

        found.append(1e3 * cpu_seconds(propose))
        _finish(study, trial, space)
    whole = {}
    for name, other in (("biased", sampler), ("random", optuna.samplers.RandomSampler(0))):
        study.sampler = other
        times = [cpu_seconds(lambda: _finish(study, study.ask(), space)) for _ in range(proposals)]
        whole[name] = 1e3 * statistics.median(times)
    # The first proposal reads all trials; later ones read what is new.
    return {"first": found[0], "proposals": found[1:], "whole trial": whole}


def _finish(study: optuna.Study, trial: optuna.Trial, space: dict[str, BaseDistribution]) -> None:
    for name, distribution in space.items():
        trial._suggest(name, distribution)
    study.tell(trial, 1.0)


def summary(found: dict[str, dict[str, Any]]) -> str:
    """Medians, the worst in twenty, the first, and whole trials beside those of random search."""
    rows = []
    for name, record in found.items():
        times = sorted(record["proposals"])
        median = statistics.median(times)
        whole = record["whole trial"]
        rows.append(
            [
                name,
                median,
                times[int(0.95 * len(times))],
                record["first"],
                whole["biased"],
                whole["random"],
                median < TARGET,
            ]
        )
    header = ["parameters", "median", "95 %", "first", "whole trial", "random search", f"median < {TARGET:g}"]
    return table(header, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=positive(int), default=10_000, help="finished before (default: %(default)s)")
    parser.add_argument("--proposals", type=positive(int), default=500, help="timed (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        found = {name: measure(space, options.trials, options.proposals) for name, space in SPACES.items()}
    finally:
        optuna.logging.set_verbosity(before)
    save(
        "search",
        "Biased random search: cost of a proposal",
        [
            f"CPU-milliseconds of one thread; a study in memory with {options.trials} finished trials, "
            f"{options.proposals} proposals. The first proposal of a process reads all trials once. A whole trial is "
            "Optuna's ask, suggest and tell; random search is Optuna's RandomSampler in the same study.",
            summary(found),
        ],
        {"optuna": optuna.__version__, "trials": options.trials, "milliseconds": found},
        command=options.command,
        folder=options.out,
    )
