"""Costs to search for, and how much better one sampler is than another on them."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import optuna
from optuna.trial import Trial


def bowl(trial: Trial) -> float:
    """A quadratic function of three parameters."""
    return sum((trial.suggest_float(f"x{i}", -1.0, 1.0) - c) ** 2 for i, c in enumerate((0.3, -0.5, 0.1)))


def valley(trial: Trial) -> float:
    """As of a learning rate and an initial variance: coupled, both logarithmic, and NaN where training diverges."""
    lr = math.log10(trial.suggest_float("lr", 1e-5, 1e1, log=True))
    a = math.log10(trial.suggest_float("variance", 1e-3, 1e2, log=True))
    best = -1.5 - 0.5 * a
    if lr - best > 0.7:
        return math.nan
    return 20.0 + 10.0 * math.tanh(abs(lr - best) / 2.0) + 5.0 * math.tanh((a - 0.3) ** 2 / 2.0)


def egg_box(trial: Trial) -> float:
    """Many local minima (Rastrigin's function)."""
    places = [trial.suggest_float(name, -5.12, 5.12) for name in ("x", "y")]
    return 20.0 + sum(v * v - 10.0 * math.cos(2.0 * math.pi * v) for v in places)


def best_values(
    landscape: Callable[[Trial], float],
    sampler: Callable[[int], optuna.samplers.BaseSampler],
    searches: int,
    trials: int,
) -> np.ndarray:
    """The best value of each search; search number s uses `sampler(s)`."""
    found = []
    for seed in range(searches):
        study = optuna.create_study(sampler=sampler(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NaN is no accident here
            study.optimize(landscape, n_trials=trials)
        found.append(study.best_value)
    return np.array(found)


def standard_errors(a: np.ndarray, b: np.ndarray) -> float:
    """How many standard errors of the difference the mean of `a` is above that of `b`."""
    return float((a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
