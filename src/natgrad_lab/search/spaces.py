"""What is searched for each optimiser of the bench: `recipes/search.json` as Optuna's distributions, and as a grid."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from natgrad_lab.search.space import Domain

FILE = Path(__file__).parents[1] / "recipes" / "search.json"

Space = dict[str, BaseDistribution]


def names() -> list[str]:
    """The optimisers that have a space."""
    return [name for name in _read() if name != "about"]


def space_of(optimizer: str) -> Space:
    """The hyper-parameters of an optimiser and where they are looked for.

    Raises:
        ValueError: the optimiser has no space.
    """
    spaces = _read()
    if optimizer not in names():
        raise ValueError(f"no search space is known for {optimizer!r}; there is one for {', '.join(names())}")
    return {name: _distribution(about) for name, about in spaces[optimizer].items()}


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sampled values as settings of an optimiser: `damping.start` becomes `start` within `damping`."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        outer, _, inner = name.partition(".")
        if inner:
            settings.setdefault(outer, {})[inner] = value
        else:
            settings[name] = value
    return settings


def grid(space: Space, trials: int) -> dict[str, list[Any]]:
    """At most `trials` points: about as many values of each parameter, in the middles of equal parts of its axis."""
    limits = {name: _values(distribution) for name, distribution in space.items()}
    counts = dict.fromkeys(space, 1)
    while True:
        open_ones = [name for name in space if counts[name] < limits[name]]
        fitting = [n for n in open_ones if np.prod(list(counts.values())) // counts[n] * (counts[n] + 1) <= trials]
        if not fitting:
            break
        counts[min(fitting, key=lambda name: counts[name])] += 1
    points = {}
    for name, distribution in space.items():
        domain = Domain({name: distribution})
        middles = (np.arange(counts[name]) + 0.5) / counts[name]
        drawn = [domain.external(point)[name] for point in domain.draw(middles[:, None])]
        points[name] = list(dict.fromkeys(drawn))
    return points


def _read() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _distribution(about: Mapping[str, Any]) -> BaseDistribution:
    if "choices" in about:
        return CategoricalDistribution(about["choices"])
    kind = IntDistribution if about.get("int") else FloatDistribution
    return kind(about["low"], about["high"], log=about.get("log", False))


def _values(distribution: BaseDistribution) -> float:
    """How many values a parameter has."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    return distribution.high - distribution.low + 1 if isinstance(distribution, IntDistribution) else float("inf")
