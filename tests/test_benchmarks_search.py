"""The benchmark of biased random search at a tiny scale: form of its table; no timings."""

import math

import pytest

from benchmarks import search


@pytest.mark.parametrize("space", search.SPACES)
def test_proposals_are_timed_and_trials_finish(space):
    record = search.measure(search.SPACES[space], trials=30, proposals=4)
    assert len(record["proposals"]) == 3 and all(t > 0 for t in record["proposals"])
    header, _, row = search.summary({space: record}).split("\n")
    assert header.count("|") == row.count("|") == 8 and space in row


def test_the_filled_study_is_a_bowl_in_the_unit_cube():
    study = search.filled(search.SPACES["2 numbers"], 200)
    best = study.best_trial.params
    assert len(study.trials) == 200
    assert abs(math.log10(best["p00"]) - (-4.0 + 4.0 * 0.3)) < 0.5 and abs(best["p01"] - 0.3) < 0.15
