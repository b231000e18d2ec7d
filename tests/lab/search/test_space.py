"""Axes against Optuna's own transformation, and the expected distances of what is missing."""

from typing import cast

import numpy as np
import pytest
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from natgrad_lab.search.space import Domain

NUMERIC = {
    "float": FloatDistribution(-2.0, 3.0),
    "log": FloatDistribution(1e-5, 1e2, log=True),
    "steps": FloatDistribution(-1.0, 2.0, step=0.25),
    "int": IntDistribution(1, 9),
    "int steps": IntDistribution(4, 20, step=4),
    "int log": IntDistribution(1, 1000, log=True),
}
CHOICES = CategoricalDistribution(("adam", None, 3))


def one(distribution):
    """The domain of one parameter, and functions from and to columns."""
    domain = Domain({"p": distribution})
    return (
        lambda u: domain.draw(np.asarray(u)[:, None])[:, 0],
        lambda values: domain.places(np.asarray(values, float)[:, None]),
        lambda value: domain.external(np.array([value]))["p"],
        domain.spreads[0],
    )


@pytest.mark.parametrize("distribution", NUMERIC.values(), ids=NUMERIC)
def test_places_and_draws_are_those_of_optuna(distribution):
    draw, places, external, _ = one(distribution)
    twin = _SearchSpaceTransform({"p": distribution}, transform_0_1=True)
    u = np.random.default_rng(0).random(200)
    values = draw(u)
    for place, value in zip(u, values, strict=True):
        expected = twin.untransform(np.array([place]))["p"]
        got = external(value)
        assert type(got) is type(expected)
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert distribution._contains(distribution.to_internal_repr(got))
        assert places([value])[0, 0] == pytest.approx(twin.transform({"p": expected})[0], abs=1e-12)


def test_every_value_of_a_parameter_with_steps_has_an_equal_share():
    draw, *_ = one(IntDistribution(4, 20, step=4))
    values, counts = np.unique(draw((np.arange(1000) + 0.5) / 1000), return_counts=True)
    assert values.tolist() == [4, 8, 12, 16, 20] and counts.tolist() == [200] * 5


def test_choices_are_equally_likely_and_at_distance_one():
    draw, places, external, _ = one(CHOICES)
    assert [external(v) for v in draw([0.0, 0.34, 0.999])] == ["adam", None, 3]
    corners = places(np.arange(3.0))
    squared = np.square(corners[:, None] - corners[None]).sum(axis=-1)
    np.testing.assert_allclose(squared, 1.0 - np.eye(3), atol=1e-15)


@pytest.mark.parametrize("distribution", [FloatDistribution(1.0, 9.0), CHOICES], ids=["float", "choices"])
def test_a_missing_value_is_at_the_expected_distance(distribution):
    """E |u - X|² over uniform X, for any u: by averaging over a fine grid of X."""
    draw, places, _, spread = one(distribution)
    everywhere = places(draw((np.arange(30_000) + 0.5) / 30_000))
    for u in places(draw([0.05, 0.5, 0.8])):
        expected = np.square(u - everywhere).sum(axis=1).mean()
        missing = np.square(u - places([np.nan])[0]).sum() + spread
        assert missing == pytest.approx(expected, rel=1e-6)


def test_several_parameters_together_are_each_by_itself():
    space = {"c": CHOICES, **NUMERIC, "d": CategoricalDistribution(("a", "b"))}
    domain, u = Domain(space), np.random.default_rng(1).random((50, len(space)))
    points = domain.draw(u)
    squared = np.zeros(50)
    for i, (name, distribution) in enumerate(space.items()):
        draw, places, external, _ = one(distribution)
        np.testing.assert_array_equal(points[:, i], draw(u[:, i]))
        assert domain.external(points[7])[name] == external(points[7, i])
        at = places(points[:, i])
        squared += np.square(at - at[3]).sum(axis=1)
    together = domain.places(points)
    assert together.shape == (50, domain.width) == (50, 3 + 6 + 2)
    np.testing.assert_allclose(np.square(together - together[3]).sum(axis=1), squared, rtol=1e-12)


def test_what_has_no_logarithm_counts_as_missing():
    _, places, *_ = one(FloatDistribution(0.1, 10.0, log=True))
    assert places([-1.0, 0.0, 10.0]).ravel().tolist() == [0.5, 0.5, pytest.approx(1.0)]


def test_a_single_value_is_drawn_and_placed():
    draw, places, *_ = one(FloatDistribution(2.0, 2.0))
    assert draw([0.1, 0.9]).tolist() == [2.0, 2.0] and places([2.0]).tolist() == [[0.0]]


def test_an_unknown_distribution_is_named():
    with pytest.raises(TypeError, match="'p' has the distribution int; expected a FloatDistribution"):
        Domain({"p": cast(BaseDistribution, 3)})
