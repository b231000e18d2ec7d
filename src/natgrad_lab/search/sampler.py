"""Biased random search as an Optuna sampler [THESIS, sec. 4.1, Algorithm 1]."""

import threading
import weakref
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from natgrad_lab.search.history import History
from natgrad_lab.search.space import Array, Domain

MAX_REJECTIONS = 1000
_FIRST_BATCH, _LARGEST_BATCH = 2, 128  # points that are drawn and judged at a time


def acceptance(estimate: Float[Array, "n"], lowest: float, highest: float) -> Float[Array, "n"]:
    """p = (c_max - c_estimate) / (c_max - c_min) [THESIS, Algorithm 1, line 7]; 1 where the formula is undefined.

    Args:
        estimate: Costs c_estimate that the model expects, in [c_min, c_max].
        lowest: c_min, over all results.
        highest: c_max. Without results, or with equal ones, every point is accepted.
    """
    spread = 0.5 * highest - 0.5 * lowest  # halves: the difference of two finite numbers may be infinite
    if not spread > 0.0:
        return np.ones_like(estimate)
    return (0.5 * highest - 0.5 * estimate) / spread


class BiasedRandomSampler(BaseSampler):
    """Random search that prefers the neighbourhood of good results [THESIS, sec. 4.1, Algorithm 1].

    A point is drawn uniformly from the domain, its cost c is estimated by that of the nearest finished trial, and it
    is accepted with probability p = (c_max - c) / (c_max - c_min); otherwise another one is drawn. Points near the
    best result are almost surely kept, points near the worst almost surely not.

    - Distances are Euclidean in the unit cube of the sampled scale: logarithmic for log-uniform parameters. Two
      different categorical choices are at distance 1. A conditional parameter that a past trial did not have counts
      as the expected squared distance to a uniform value.
    - Failed and pruned trials, and those whose result is not finite, count as c_max. Running trials do not count.
    - With fewer than two results, or with equal ones, every point is accepted. After `MAX_REJECTIONS` rejections the
      point with the largest p is taken.
    - The direction of the study is respected. A parameter that no finished trial had yet is drawn uniformly.

    With a seed, the random numbers of a trial depend on the seed and on the number of the trial alone. So a study that
    was killed and resumed goes on as if it had not stopped, and parallel workers on one storage, which never have the
    same trial number, may share a seed. (`study.optimize` with `n_jobs` above 1 calls `reseed_rng`: then nothing is
    reproducible, as with every sampler of Optuna.) All else is read from the storage, so workers always agree.

    Args:
        seed: A whole number of at least 0; None for another search every time.

    Raises:
        TypeError: the seed is no whole number.
        ValueError: it is negative; later, the study has several objectives.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None:
            if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
                raise TypeError(f"seed is {seed!r}; expected a whole number of at least 0, or None")
            if seed < 0:
                raise ValueError(f"seed is {seed}; expected a whole number of at least 0, or None")
        self._seed = None if seed is None else int(seed)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._histories: weakref.WeakKeyDictionary[Study, History] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._seed = state["seed"]
        self._start()

    def reseed_rng(self) -> None:
        """Forget the seed: from now on every proposal takes fresh randomness from the system."""
        self._seed = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters that finished trials had, with their latest distributions, by name."""
        with self._lock:
            return dict(sorted(self._read(study).space.items()))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point: one that Algorithm 1 does not reject."""
        if not search_space:
            return {}
        rng = self._rng(trial)
        with self._lock:
            history = self._histories.get(study)
            if history is None:  # `infer_relative_search_space` read it, unless another sampler stands in between
                history = self._read(study)
            return _propose(rng, history.domain(search_space), history)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform value on the sampled scale, for a parameter of which nothing is known."""
        _direction(study)
        domain = Domain({param_name: param_distribution})
        return domain.external(domain.draw(self._rng(trial, param_name).random((1, 1)))[0])[param_name]

    def _rng(self, trial: FrozenTrial, name: str = "") -> np.random.Generator:
        if self._seed is None:
            return np.random.default_rng()
        return np.random.default_rng([self._seed, trial.number, zlib.crc32(name.encode())])

    def _read(self, study: Study) -> History:
        """The history of a study, up to date."""
        history = self._histories.get(study)
        if history is None:
            history = self._histories[study] = History(-1.0 if _direction(study) == StudyDirection.MAXIMIZE else 1.0)
        history.read(study.get_trials(deepcopy=False))
        return history


def _direction(study: Study) -> StudyDirection:
    """The direction of a study with one objective."""
    directions = study.directions
    if len(directions) > 1:
        raise ValueError(
            f"the study has {len(directions)} objectives, but BiasedRandomSampler estimates one cost; "
            "use a sampler for several, for example optuna.samplers.NSGAIISampler"
        )
    return directions[0]


def _propose(rng: np.random.Generator, domain: Domain, history: History) -> dict[str, Any]:
    """Draw points until one is accepted, a few at a time."""
    best, best_p = np.empty(0), -1.0
    drawn, batch = 0, _FIRST_BATCH
    while drawn <= MAX_REJECTIONS:
        points, x = domain.draw(rng.random((batch, len(domain.space)))), rng.random(batch)
        estimate = history.estimate(domain, points) if len(history) else np.zeros(batch)
        p = acceptance(estimate, history.lowest, history.highest)
        accepted = np.flatnonzero(x < p)
        if len(accepted):
            return domain.external(points[accepted[0]])
        if p.max() > best_p:
            best, best_p = points[p.argmax()], p.max()
        drawn, batch = drawn + batch, min(2 * batch, _LARGEST_BATCH)
    return domain.external(best)
