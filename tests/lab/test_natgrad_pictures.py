"""Pictures of [NATGRAD]'s figures 2, 4, 5 and table 1: runs that diverged, short runs, a legend beside the data."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.ticker import MaxNLocator

from natgrad_lab.figures import drawing
from natgrad_lab.recipes.natgrad_comparison import method_of
from natgrad_lab.recipes.run import Record

FILES = Path(__file__).parents[2] / "docs" / "papers" / "files"


def content(name: str) -> dict[str, Any]:
    return copy.deepcopy(json.loads((FILES / f"{name}.json").read_text()))


def drawn(found: dict[str, Any], tmp_path: Path) -> drawing.Drawing:
    record = Record(tmp_path, found)
    result = drawing.draw(record)
    assert any(path.suffix == ".png" for path in drawing.write(record, result, tmp_path))
    return result


@pytest.mark.parametrize("name", ["natgrad-fig2", "natgrad-fig5"])
def test_a_run_that_diverged_ends_early_and_is_called_so(name: str, tmp_path: Path) -> None:
    """One of several runs: fewer evaluations, the last one without a training nll."""
    found = content(name)
    part = list(found["results"])[1]
    for columns in (found["results"][part],):
        for key in ("update", "train", "test"):
            columns[key] = columns[key][:4]
        columns["train"][-1], columns["end"] = None, "diverged"
    rows = {what: here for what, _, here in drawn(found, tmp_path).rows}
    method = method_of(part)
    assert rows[f"{method}: train nll"] == "diverged"
    assert all(here != "diverged" for what, here in rows.items() if not what.startswith(method))


def test_table_1_without_a_test_error(tmp_path: Path) -> None:
    found = content("natgrad-table1")
    found["results"]["natgrad-fig4"]["methods"]["covariance"] = {"train": [None], "test": [None]}
    rows = {what: here for what, _, here in drawn(found, tmp_path).rows}
    assert rows["few digits: covariance: test error"] == "diverged"
    assert rows["few digits: KL, unlabelled, damping 0.01: test error"] == "5.21 % (5.07 to 5.31)"  # not in the paper
    assert rows["few digits: MSGD: test error"] == "4.96 % (4.87 to 5.03)"


def test_the_legend_of_table_1_is_no_mark_among_the_data(tmp_path: Path) -> None:
    figure = drawn(content("natgrad-table1"), tmp_path).figures[""]
    assert figure.legends and all(axes.get_legend() is None for axes in figure.axes)


def test_updates_are_whole(tmp_path: Path) -> None:
    found = content("natgrad-fig5")
    for columns in found["results"].values():
        for i in range(len(columns["update"])):
            columns["update"][i] = i
        for key in ("update", "train", "test"):
            columns[key] = columns[key][:4]
    for axes in drawn(found, tmp_path).figures[""].axes:
        assert isinstance(axes.xaxis.get_major_locator(), MaxNLocator)
        assert all(tick == int(tick) for tick in axes.get_xticks())
