"""Algorithm 1 as an Optuna sampler: acceptance, seeds, resumption, parallel workers, and Optuna's own checks."""

import math
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import numpy as np
import optuna
import pytest
from lab.search.landscapes import best_values, bowl, egg_box, standard_errors, valley
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GridSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from natgrad_lab.search import BiasedRandomSampler, acceptance
from natgrad_lab.search.sampler import MAX_REJECTIONS

UNIT = FloatDistribution(0.0, 1.0)


class TestContract(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    """Optuna's own checks of a sampler."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return BiasedRandomSampler


def known(results: dict[float, float], direction: str = "minimize", seed: int | None = 0) -> optuna.Study:
    """A study of one parameter x in [0, 1] with these results."""
    study = optuna.create_study(direction=direction, sampler=BiasedRandomSampler(seed))
    study.add_trials([create_trial(params={"x": x}, distributions={"x": UNIT}, value=v) for x, v in results.items()])
    return study


def proposals(study: optuna.Study, n: int) -> np.ndarray:
    """What the next `n` trials would get if none of them finished."""
    found = []
    for number in range(n):
        trial = cast(FrozenTrial, SimpleNamespace(number=number))
        space = study.sampler.infer_relative_search_space(study, trial)
        given = study.sampler.sample_relative(study, trial, space)
        found.append(given["x"] if given else study.sampler.sample_independent(study, trial, "x", UNIT))
    return np.array(found)


def trace(study: optuna.Study) -> list[dict]:
    return [t.params for t in study.get_trials(deepcopy=False)]


def test_acceptance_is_as_printed():
    p = acceptance(np.array([1.0, 2.0, 4.0, 5.0]), 1.0, 5.0)
    np.testing.assert_allclose(p, [1.0, 0.75, 0.25, 0.0], rtol=1e-15)
    assert acceptance(np.array([3.0]), 3.0, 3.0).tolist() == [1.0]  # c_max = c_min
    assert acceptance(np.array([0.0]), math.inf, -math.inf).tolist() == [1.0]  # no results
    huge = acceptance(np.array([-1.7e308, 0.0, 1.7e308]), -1.7e308, 1.7e308)  # c_max - c_min is no finite number
    np.testing.assert_allclose(huge, [1.0, 0.5, 0.0], rtol=1e-15)


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
def test_proposals_fall_into_each_cell_in_proportion_to_its_acceptance(direction, sign):
    """Cells of the nearest neighbour: [0, .2), [.2, .5), [.5, .8), [.8, 1]; p = 1, 1/2, 0, 3/4."""
    study = known({0.1: sign * 2.0, 0.3: sign * 4.0, 0.7: sign * 6.0, 0.9: sign * 3.0}, direction)
    n = 4000
    counts, _ = np.histogram(proposals(study, n), [0.0, 0.2, 0.5, 0.8, 1.0])
    mass = np.array([0.2, 0.3, 0.3, 0.2]) * [1.0, 0.5, 0.0, 0.75]
    expected = mass / mass.sum()
    assert counts[2] == 0
    for got, share in zip(counts, expected, strict=True):
        assert abs(got - n * share) <= 3.5 * math.sqrt(n * share * (1 - share))


def test_proposals_are_uniform_within_a_cell():
    inside = proposals(known({0.25: 0.0, 0.75: 1.0}), 2000)
    assert inside.max() < 0.5 and abs(inside.mean() - 0.25) < 4 * 0.5 / math.sqrt(12 * 2000)


@pytest.mark.parametrize(
    "results", [{}, {0.3: 1.0}, {0.3: 1.0, 0.6: 1.0}], ids=["no result", "one result", "equal results"]
)
def test_everything_is_accepted_where_the_probability_is_undefined(results):
    study = known(results)
    drawn = np.sort(proposals(study, 500))
    assert np.abs(drawn - (np.arange(500) + 0.5) / 500).max() < 1.63 / math.sqrt(500)  # Kolmogorov-Smirnov, 1 %


def test_failed_nan_and_pruned_trials_are_avoided_like_the_worst():
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        if x < 0.2:
            raise RuntimeError("no memory")
        if x < 0.4:
            return math.nan
        if x < 0.6:
            raise optuna.TrialPruned
        return 2.0 if x < 0.8 else 1.0

    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.optimize(objective, n_trials=200, catch=RuntimeError)
    x = np.array([t.params["x"] for t in study.get_trials(deepcopy=False)])
    # Once each fifth has been seen, all but the last are worst: with 1 and 2 as results, 2 is c_max.
    assert (x[20:] > 0.75).mean() > 0.95
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED}


def test_rejections_are_capped():
    """One good point in a sea of bad ones: the share of space where p > 0 is about 1e-7."""
    study = known({0.5 + sign * 1e-7: 1.0 for sign in (-1.0, 1.0)} | {0.5: 0.0})
    assert 0.0 <= proposals(study, 1)[0] <= 1.0
    assert MAX_REJECTIONS == 1000


def test_the_capped_proposal_is_the_likeliest_one():
    """p = 1e-6 below 1/2, 0 above, and a good point in between that is practically never hit."""
    drawn = proposals(known({0.5 - 2e-7: 1.0 - 1e-6, 0.5: 0.0, 0.5 + 2e-7: 1.0}), 50)
    assert (drawn < 0.5).all() and drawn.min() < 0.1


def test_reproducible_by_seed():
    def run(seed: int) -> list[dict]:
        study = optuna.create_study(sampler=BiasedRandomSampler(seed))
        study.optimize(egg_box, n_trials=25)
        return trace(study)

    assert run(3) == run(3)
    assert run(3)[0] != run(4)[0]


def test_no_seed_is_another_search_every_time():
    study = known({}, seed=None)
    assert proposals(study, 1)[0] != proposals(study, 1)[0]


def test_reseeding_forgets_the_seed():
    study = known({})
    before = proposals(study, 3)
    assert proposals(study, 3).tolist() == before.tolist()
    study.sampler.reseed_rng()
    assert not set(proposals(study, 3)) & set(proposals(study, 3)) and not set(proposals(study, 3)) & set(before)


def test_parameters_of_a_trial_are_independent():
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    trials = [study.ask({"x": UNIT, "y": UNIT}) for _ in range(400)]
    x, y = np.array([[t.params["x"], t.params["y"]] for t in trials]).T
    assert abs(np.corrcoef(x, y)[0, 1]) < 3.3 / math.sqrt(400)


def test_killed_and_resumed_from_sqlite_goes_on_as_if_it_had_not_stopped(tmp_path):
    def run(name: str, *parts: int) -> list[dict]:
        for n in parts:
            url = f"sqlite:///{tmp_path}/search.db"
            study = optuna.create_study(
                study_name=name, storage=url, sampler=BiasedRandomSampler(5), load_if_exists=True
            )
            study.optimize(valley, n_trials=n)
        return trace(study)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run("whole", 12) == run("in parts", 5, 1, 6)


def test_parallel_workers_on_one_sqlite_storage(tmp_path):
    """Workers with the same seed never repeat each other, and each learns from all."""
    url = f"sqlite:///{tmp_path}/search.db"
    optuna.create_study(study_name="s", storage=url, direction="maximize")

    def work(worker: int) -> None:
        sampler = BiasedRandomSampler(0)
        study = optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(url), sampler=sampler)
        study.optimize(lambda t: -abs(t.suggest_float("x", 0.0, 1.0) - 0.9), n_trials=8)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    study = optuna.load_study(study_name="s", storage=url, sampler=BiasedRandomSampler(0))
    x = np.array([t.params["x"] for t in study.trials])
    assert len(set(x)) == 24 and all(t.state == TrialState.COMPLETE for t in study.trials)
    assert x[8:].mean() > 0.55
    # A worker that comes late knows the same as those that were there from the start.
    late, other = (s.infer_relative_search_space(study, study.trials[-1]) for s in _samplers(2))
    assert late == other == {"x": FloatDistribution(0.0, 1.0)}


def _samplers(n: int) -> list[BiasedRandomSampler]:
    return [BiasedRandomSampler(0) for _ in range(n)]


def test_threads_share_one_sampler():
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    study.optimize(bowl, n_trials=60, n_jobs=3)
    assert len({tuple(t.params.values()) for t in study.trials}) == 60


def test_a_sampler_survives_pickling():
    study = known({0.1: 1.0, 0.9: 2.0})
    before = proposals(study, 5)
    study.sampler = pickle.loads(pickle.dumps(study.sampler))
    assert proposals(study, 5).tolist() == before.tolist()


def conditional(trial: optuna.Trial) -> float:
    """The better branch has a learning rate and a momentum of its own."""
    kind = trial.suggest_categorical("optimizer", ["sgd", "adam", "none"])
    if kind == "none":
        return 5.0
    lr = math.log10(trial.suggest_float(f"{kind}_lr", 1e-5, 1e1, log=True))
    if kind == "adam":
        return 2.0 + abs(lr + 3.0)
    return abs(lr + 1.0) + trial.suggest_int("steps", 1, 9) / 9


def test_conditional_and_categorical_parameters_are_biased_too():
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    study.optimize(conditional, n_trials=300)
    late = study.get_trials(deepcopy=False)[100:]
    share = {kind: np.mean([t.params["optimizer"] == kind for t in late]) for kind in ("sgd", "adam", "none")}
    assert share["sgd"] > 0.4 and share["none"] < 0.15
    lr = np.log10([t.params["sgd_lr"] for t in late if "sgd_lr" in t.params])
    assert np.abs(lr + 1.0).mean() < 1.45  # 1.67 for uniform proposals
    assert np.mean([t.params["steps"] for t in late if "steps" in t.params]) < 4.9


def test_fixed_and_enqueued_parameters_are_kept():
    study = optuna.create_study(sampler=PartialFixedSampler({"x1": 0.25}, BiasedRandomSampler(0)))
    study.optimize(bowl, n_trials=20)
    assert {t.params["x1"] for t in study.trials} == {0.25}
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    study.optimize(bowl, n_trials=5)
    study.enqueue_trial({"x0": 0.5})
    study.optimize(bowl, n_trials=1)
    assert study.trials[-1].params["x0"] == 0.5


def test_with_the_brackets_of_hyperband():
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        for step in range(9):
            trial.report(x + 1.0 / (step + 1), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return x

    pruner = optuna.pruners.HyperbandPruner(max_resource=9)
    study = optuna.create_study(sampler=BiasedRandomSampler(0), pruner=pruner)
    study.optimize(objective, n_trials=40)
    assert study.best_value < 0.1


@pytest.mark.parametrize("name", ["tpe", "random", "grid"])
def test_other_samplers_are_unaffected(name):
    def make() -> BaseSampler:
        grid = {"x": [-4.0, 0.0, 4.0], "y": [-4.0, 0.0, 4.0]}
        return {"tpe": TPESampler(seed=0), "random": RandomSampler(0), "grid": GridSampler(grid, seed=0)}[name]

    def run(between: Callable[[], object]) -> list[dict]:
        study = optuna.create_study(sampler=make())
        for _ in range(3):
            study.optimize(egg_box, n_trials=5)
            between()
        return trace(study)

    def biased() -> None:
        optuna.create_study(sampler=BiasedRandomSampler(1)).optimize(egg_box, n_trials=3)

    before = np.random.get_state()[1].tolist()
    assert run(lambda: None) == run(biased)
    assert np.random.get_state()[1].tolist() == before


def test_a_study_may_change_its_sampler():
    """The sampler reads what others have found."""
    study = optuna.create_study(sampler=RandomSampler(0))
    study.optimize(bowl, n_trials=50)
    study.sampler = BiasedRandomSampler(0)
    study.optimize(bowl, n_trials=50)
    values = [t.value for t in study.trials]
    assert np.mean(values[50:]) < 0.85 * np.mean(values[:50])


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed is -1; expected a whole number of at least 0, or None"),
        (1.5, TypeError, "seed is 1.5; expected a whole number"),
        ("7", TypeError, "seed is '7'"),
        (True, TypeError, "seed is True"),
    ],
)
def test_a_seed_is_a_whole_number(seed, error, message):
    with pytest.raises(error, match=message):
        BiasedRandomSampler(seed)


def test_several_objectives_are_refused_by_name():
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=BiasedRandomSampler(0))
    with pytest.raises(ValueError, match="2 objectives, but BiasedRandomSampler estimates one cost"):
        study.optimize(lambda t: (t.suggest_float("x", 0, 1), 0.0), n_trials=1)


def test_categories_alone_and_noise():
    """Repeated points are averaged: one lucky result does not make a choice good for ever."""
    choices = CategoricalDistribution(("good", "bad"))
    study = optuna.create_study(sampler=BiasedRandomSampler(0))
    rng = np.random.default_rng(0)
    for _ in range(200):
        trial = study.ask({"c": choices})
        study.tell(trial, rng.normal() + (3.0 if trial.params["c"] == "bad" else 0.0))
    late = [t.params["c"] for t in study.trials[50:]]
    assert late.count("good") > 1.8 * late.count("bad")


def compare(landscape: Callable, searches: int, trials: int) -> float:
    biased = best_values(landscape, BiasedRandomSampler, searches, trials)
    plain = best_values(landscape, lambda seed: RandomSampler(10_000 + seed), searches, trials)
    return standard_errors(plain, biased)


def test_biased_beats_random_search():
    assert compare(valley, 30, 60) > 2.5


@pytest.mark.slow
def test_biased_beats_random_search_over_100_searches_of_100_trials():
    """By more than three standard errors on two of three landscapes, and it is worse on none."""
    better = [compare(landscape, 100, 100) for landscape in (bowl, valley, egg_box)]
    assert sorted(better)[1] > 3.0 and min(better) > 0.0, better
