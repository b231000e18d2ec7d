"""The model of costs: nearest trials against brute force, what counts as worst, and arrays that grow with the study."""

import math

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from natgrad_lab.search.history import History

X, LR = FloatDistribution(0.0, 4.0), FloatDistribution(1e-4, 1.0, log=True)
SPACE = {"lr": LR, "x": X}


def trial(value=None, state=TrialState.COMPLETE, **params):
    kinds = {name: SPACE[name] for name in params}
    return create_trial(params=params, distributions=kinds, value=value, state=state)


def read(*trials, direction="minimize"):
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    history = History(-1.0 if direction == "maximize" else 1.0)
    history.read(study.get_trials(deepcopy=False))
    return history


def estimate(history, space, points):
    return history.estimate(history.domain(space), points)


def test_the_estimate_is_that_of_the_nearest_trial_on_the_sampled_scale():
    rng = np.random.default_rng(0)
    unit, costs = rng.random((300, 2)), rng.random(300)
    history = read(*(trial(c, lr=10 ** (4 * u - 4), x=4 * v) for c, (u, v) in zip(costs, unit, strict=True)))
    asked = rng.random((50, 2))
    points = np.stack([10 ** (4 * asked[:, 0] - 4), 4 * asked[:, 1]], axis=1)
    nearest = np.square(asked[:, None] - unit[None]).sum(axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(estimate(history, SPACE, points), costs[nearest])
    # On the plain scale other trials are nearest: the logarithm matters.
    plain = np.square((points[:, None] - points_of(unit)[None]) / [1.0, 4.0]).sum(axis=-1).argmin(axis=1)
    assert (plain != nearest).mean() > 0.2


def points_of(unit):
    return np.stack([10 ** (4 * unit[:, 0] - 4), 4 * unit[:, 1]], axis=1)


def test_trials_without_a_finite_result_are_worst_whatever_the_worst_is_by_then():
    bad = [
        trial(state=TrialState.FAIL, x=0.0),
        trial(1.0, state=TrialState.PRUNED, x=1.0),  # a pruned trial may have a value: that of its last report
        trial(math.inf, x=2.0),
        trial(-math.inf, x=3.0),
    ]
    history = read(*bad, trial(5.0, x=4.0), trial(7.0, x=3.7))
    points = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    assert estimate(history, {"x": X}, points).tolist() == [7.0, 7.0, 7.0, 7.0, 5.0]
    assert (history.lowest, history.highest) == (5.0, 7.0)


def test_costs_of_a_study_that_maximises_change_their_sign():
    history = read(trial(5.0, x=1.0), trial(7.0, x=3.0), trial(state=TrialState.FAIL, x=4.0), direction="maximize")
    assert (history.lowest, history.highest) == (-7.0, -5.0)
    assert estimate(history, {"x": X}, np.array([[1.0], [3.0], [4.0]])).tolist() == [-5.0, -7.0, -5.0]


def test_equal_points_share_their_mean():
    history = read(trial(1.0, x=1.0), trial(4.0, x=1.0), trial(state=TrialState.FAIL, x=1.0), trial(9.0, x=3.0))
    assert len(history) == 2
    assert estimate(history, {"x": X}, np.array([[1.0]])).tolist() == [(1.0 + 4.0 + 9.0) / 3]


def test_only_what_is_new_or_was_running_is_read_again(monkeypatch):
    study = optuna.create_study()
    running = study.ask({"x": X})
    study.add_trials([trial(float(i), x=0.01 * i) for i in range(100)])
    history, added = History(1.0), []
    plain = History._add
    monkeypatch.setattr(History, "_add", lambda self, t: added.append(t.number) or plain(self, t))
    history.read(study.get_trials(deepcopy=False))
    assert added == list(range(1, 101))
    study.tell(running, 50.0)
    study.add_trial(trial(-3.0, x=2.0))
    history.read(study.get_trials(deepcopy=False))
    history.read(study.get_trials(deepcopy=False))
    assert added == [*range(1, 101), 0, 101]
    assert (history.lowest, history.highest) == (-3.0, 99.0)


def test_a_growing_model_is_that_of_all_trials_at_once():
    rng = np.random.default_rng(1)
    trials = [trial(c, lr=10 ** (4 * u - 4), x=4 * v) for u, v, c in rng.random((90, 3))]
    points = points_of(rng.random((20, 2)))
    study, growing = optuna.create_study(), History(1.0)
    for i, t in enumerate(trials):
        study.add_trial(t)
        growing.read(study.get_trials(deepcopy=False))
        if i % 7 == 0:
            expected = estimate(read(*trials[: i + 1]), SPACE, points)
            np.testing.assert_array_equal(estimate(growing, SPACE, points), expected)


def test_gaps_in_the_numbers_of_trials_are_read_anew():
    """A bracket of Hyperband shows some of the trials; which places they have in the list may change."""
    study = optuna.create_study()
    study.add_trials([trial(float(i), x=0.1 * i) for i in range(6)])
    everything = study.get_trials(deepcopy=False)
    history = History(1.0)
    history.read([everything[1], everything[4]])
    assert (history.lowest, history.highest) == (1.0, 4.0)
    history.read([everything[0], everything[1], everything[3], everything[4]])
    assert (len(history), history.lowest, history.highest) == (4, 0.0, 4.0)
    history.read(everything)
    assert (len(history), history.highest) == (6, 5.0)


def test_the_space_has_the_latest_distribution_of_everything_with_a_choice():
    wide, fixed = FloatDistribution(0.0, 40.0), FloatDistribution(2.0, 2.0)
    kind = CategoricalDistribution(("a", "b"))
    history = read(
        create_trial(params={"x": 1.0, "kind": "a"}, distributions={"x": X, "kind": kind}, value=1.0),
        create_trial(params={"x": 30.0, "c": 2.0}, distributions={"x": wide, "c": fixed}, value=2.0),
        create_trial(state=TrialState.FAIL),
    )
    assert history.space == {"x": wide, "kind": kind}
    assert len(history) == 2  # a trial that failed before it had a parameter says nothing about any place


def test_a_missing_parameter_keeps_branches_apart():
    """Within a branch its own parameter decides; the parameter of the other branch makes no difference."""
    kind = CategoricalDistribution(("a", "b"))
    of = {
        ("a", 0.5): 1.0,
        ("a", 3.5): 2.0,
        ("b", None): 3.0,
    }
    trials = [
        create_trial(
            params={"kind": k, **({"x": x} if x is not None else {})},
            distributions={"kind": kind, **({"x": X} if x is not None else {})},
            value=value,
        )
        for (k, x), value in of.items()
    ]
    points = np.array([[0.0, 0.4], [0.0, 3.6], [1.0, 0.5], [1.0, 3.5]])
    assert estimate(read(*trials), {"kind": kind, "x": X}, points).tolist() == [1.0, 2.0, 3.0, 3.0]


def test_a_parameter_that_no_trial_had_makes_no_difference():
    history = read(trial(1.0, x=1.0), trial(2.0, x=3.0))
    points = np.array([[0.9, 0.0], [2.9, 1.0]])
    assert estimate(history, {"x": X, "z": FloatDistribution(0.0, 1.0)}, points).tolist() == [1.0, 2.0]
