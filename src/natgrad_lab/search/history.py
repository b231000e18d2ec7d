"""What a study has found so far, as arrays that grow with it, and the 1-nearest-neighbour model of its costs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from natgrad_lab.search.space import Array, Domain

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class History:
    """The finished trials of one study. Costs are minimised: values of a study that maximises change their sign.

    Failed and pruned trials, and results that are not finite, have no cost of their own: they count as the largest
    finite one, whatever it is at the time of the question. Trials with equal parameters share a row, whose cost is
    their mean. Running trials do not count.

    Attributes:
        space: The latest distribution of each parameter that a finished trial had and that has a choice, by name.
        lowest, highest: Costs c_min and c_max over the trials with a finite result; inf and -inf without any.
    """

    def __init__(self, sign: float) -> None:
        self.sign = sign
        self._forget()

    def _forget(self) -> None:
        self.space: dict[str, BaseDistribution] = {}
        self.lowest, self.highest = math.inf, -math.inf
        self._next = 0  # trials before this place have been looked at …
        self._open: list[int] = []  # … and these were not finished then
        self._whole = True
        self._rows: dict[frozenset[tuple[str, float]], int] = {}
        self._columns: dict[str, int] = {}
        self._values = np.full((16, 4), np.nan)
        self._results = np.zeros((16, 3))  # sum of finite costs, their number, number of trials without one
        self._model: _Neighbours | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Take in what has finished since the last call; `trials` are all trials of the study, by number.

        Only new trials and those that were running are looked at, unless there are gaps in the numbers (as in a
        bracket of Hyperband): then all are, every time.
        """
        whole = not trials or trials[-1].number == len(trials) - 1
        if not (whole and self._whole) or len(trials) < self._next:
            self._forget()
        self._whole = whole
        places = [*self._open, *range(self._next, len(trials))]
        self._open = [place for place in places if trials[place].state not in _FINISHED]
        self._next = len(trials)
        for place in places:
            if trials[place].state in _FINISHED and trials[place].distributions:
                self._add(trials[place])

    def _add(self, trial: FrozenTrial) -> None:
        internal = {name: d.to_internal_repr(trial.params[name]) for name, d in trial.distributions.items()}
        row = self._rows.setdefault(frozenset(internal.items()), len(self._rows))
        if row == len(self._values):
            self._values = np.concatenate([self._values, np.full_like(self._values, np.nan)])
            self._results = np.concatenate([self._results, np.zeros_like(self._results)])
        for name, value in internal.items():
            column = self._columns.setdefault(name, len(self._columns))
            if column == self._values.shape[1]:
                self._values = np.concatenate([self._values, np.full_like(self._values, np.nan)], axis=1)
            self._values[row, column] = value
            if not trial.distributions[name].single():
                self.space[name] = trial.distributions[name]
            else:
                self.space.pop(name, None)
        value = trial.values[0] if trial.state == TrialState.COMPLETE and trial.values else math.nan
        if math.isfinite(value):
            cost = self.sign * value
            self._results[row] += (cost, 1.0, 0.0)
            self.lowest, self.highest = min(self.lowest, cost), max(self.highest, cost)
        else:
            self._results[row, 2] += 1.0

    def domain(self, space: Mapping[str, BaseDistribution]) -> Domain:
        """The domain of these parameters; the same object as long as they do not change."""
        if self._model is None or self._model.domain.space != space:
            self._model = _Neighbours(Domain(space))
        return self._model.domain

    def estimate(self, domain: Domain, points: Float[Array, "n p"]) -> Float[Array, "n"]:
        """c_estimate: the cost of the nearest trial, for each of n points.

        A parameter that a past trial did not have counts as the expected squared distance to a uniform value of it.
        """
        if self._model is None or self._model.domain is not domain:
            self._model = _Neighbours(domain)
        columns = [self._columns.get(name, -1) for name in domain.space]
        self._model.extend(self._values, len(self._rows), columns)
        total, finite, worst = self._results[self._model.nearest(points)].T
        return (total + worst * self.highest) / (finite + worst)


class _Neighbours:
    """Places h of a history's rows. For a point at u: |h - u|² = (|h|² + spreads of what is missing) - 2 h·u + |u|²."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.size = 0
        self.places = np.empty((0, domain.width))
        self.offsets = np.empty(0)

    def extend(self, values: Array, size: int, columns: Sequence[int]) -> None:
        """Add the rows up to `size`; `columns` says where the parameters of the domain are, -1 for nowhere."""
        if size == self.size:
            return
        # One more column, NaN, for parameters that no trial has had yet: index -1.
        new = np.concatenate([values[self.size : size], np.full((size - self.size, 1), np.nan)], axis=1)[:, columns]
        if size > len(self.places):
            self.places = np.concatenate([self.places, np.empty((2 * size - len(self.places), self.domain.width))])
            self.offsets = np.concatenate([self.offsets, np.empty(2 * size - len(self.offsets))])
        places = self.domain.places(new)
        self.places[self.size : size] = places
        self.offsets[self.size : size] = np.square(places).sum(axis=1) + np.isnan(new) @ self.domain.spreads
        self.size = size

    def nearest(self, points: Float[Array, "n p"]) -> Int[Array, "n"]:
        """The row nearest to each point; |u|² is the same for all rows."""
        distances = (-2.0 * self.domain.places(points)) @ self.places[: self.size].T
        distances += self.offsets[: self.size]
        return distances.argmin(axis=1)
