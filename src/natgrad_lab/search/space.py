"""The domain that is searched, as a part of a Euclidean space in which distances between its points are taken.

Points are rows of Optuna's internal numbers, one column for each parameter: the value itself, or the index of a
categorical choice; NaN where a trial did not have the parameter.

A number lies in [0, 1] on its sampled scale: logarithmic for log-uniform parameters; one with steps is stretched by
half a step at both ends, so that every value has an equal share. A choice out of k is a corner of a simplex with
sides of length 1.

A value that is missing lies at the mean of a uniform one, and its squared distances grow by the variance of a uniform
one: together that is the expected squared distance.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Array = np.ndarray


class Domain:
    """The parameters of a search together.

    Args:
        space: Their distributions, in the order of the columns.

    Attributes:
        spreads: The variance of a uniform value of each parameter [p].
        width: Coordinates of a place.

    Raises:
        TypeError: a distribution is none of Optuna's three kinds.
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.space = dict(space)
        for name, distribution in space.items():
            if not isinstance(distribution, CategoricalDistribution | FloatDistribution | IntDistribution):
                raise TypeError(
                    f"the parameter {name!r} has the distribution {type(distribution).__name__}; expected a "
                    "FloatDistribution, IntDistribution or CategoricalDistribution of Optuna"
                )
        kinds = list(space.values())
        numeric = [i for i, d in enumerate(kinds) if not isinstance(d, CategoricalDistribution)]
        self._numeric = np.array(numeric, dtype=int)
        self._categorical = [(i, _corners(d)) for i, d in enumerate(kinds) if isinstance(d, CategoricalDistribution)]
        numbers: list[Any] = [kinds[i] for i in numeric]
        self._low = np.array([float(d.low) for d in numbers])
        self._high = np.array([float(d.high) for d in numbers])
        self._step = np.array([float(d.step or 0.0) for d in numbers])
        self._log = np.array([d.log for d in numbers], dtype=bool)
        self._start = self._scale(self._low - 0.5 * self._step)
        self._span = self._scale(self._high + 0.5 * self._step) - self._start
        self._span[self._span == 0.0] = 1.0  # a single value
        self.spreads = np.full(len(kinds), 1.0 / 12.0)
        for i, corners in self._categorical:
            self.spreads[i] = 0.5 * (1.0 - 1.0 / len(corners))
        self.width = len(numeric) + sum(len(corners) for _, corners in self._categorical)

    def draw(self, u: Float[Array, "n p"]) -> Float[Array, "n p"]:
        """Points for uniform numbers in [0, 1): uniform on the sampled scale, then the nearest step."""
        points = np.empty_like(u)
        for i, corners in self._categorical:
            points[:, i] = np.floor(u[:, i] * len(corners))
        values = self._start + u[:, self._numeric] * self._span
        values[:, self._log] = np.exp(values[:, self._log])
        stepped = self._step > 0.0
        low, step = self._low[stepped], self._step[stepped]
        values[:, stepped] = low + step * np.round((values[:, stepped] - low) / step)
        points[:, self._numeric] = values.clip(self._low, self._high)
        return points

    def places(self, points: Float[Array, "n p"]) -> Float[Array, "n width"]:
        """Where points lie. A number that has no logarithm but should counts as missing."""
        numbers = (self._scale(points[:, self._numeric]) - self._start) / self._span
        numbers[np.isnan(numbers)] = 0.5
        if not self._categorical:
            return numbers
        return np.concatenate([numbers, *(_at(corners, points[:, i]) for i, corners in self._categorical)], axis=1)

    def external(self, point: Float[Array, "p"]) -> dict[str, Any]:
        """A point as the objective function gets it: floats, ints and choices by name."""
        found: dict[str, Any] = {}
        for (name, distribution), value in zip(self.space.items(), point.tolist(), strict=True):
            found[name] = (
                distribution.to_external_repr(int(value))
                if isinstance(distribution, CategoricalDistribution)
                else int(round(value))
                if isinstance(distribution, IntDistribution)
                else value
            )
        return found

    def _scale(self, values: Array) -> Array:
        """Numbers on the sampled scale."""
        scaled = values.astype(float)
        logarithmic = scaled[..., self._log]
        scaled[..., self._log] = np.log(np.where(logarithmic > 0.0, logarithmic, math.nan))
        return scaled


def _corners(distribution: CategoricalDistribution) -> Array:
    return np.eye(len(distribution.choices)) / math.sqrt(2.0)


def _at(corners: Float[Array, "k k"], indices: Float[Array, "n"]) -> Float[Array, "n k"]:
    """A corner for each index; the centre for what is missing."""
    missing = np.isnan(indices)
    places = corners[np.where(missing, 0, indices).astype(int)]
    places[missing] = corners.mean(axis=0)
    return places
