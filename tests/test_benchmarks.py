"""The benchmarks at a tiny scale: numbers of the helpers, form of the tables, agreement of data files; no timings."""

import argparse
import json
import math
from typing import Any

import pytest
import torch

from benchmarks import (
    chain_setup,
    convergence,
    docs,
    fisher_products,
    gradient_covariance,
    layer_cost,
    memory,
    operations,
    report,
    robustness,
    sweep,
    thesis_cost,
    truncated_newton,
    update_cost,
)
from benchmarks.__main__ import NAMES, run
from benchmarks.measure import enter, first_at, median, ratio, run_cpu
from natgrad_lab import data
from natgrad_lab.optimizers import RECIPES
from natgrad_lab.records import finite
from natgrad_lab.runner import Runner


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=200, test=50)


def well_formed(table: str) -> list[list[str]]:
    """The cells of a Markdown table, whose lines all have as many as its header."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    assert len({len(line) for line in lines}) == 1, table
    assert set("".join(lines[1])) <= set("-:")
    return [lines[0], *lines[2:]]


def reached(optimizer: str, seed: int, updates: int, seconds: float, *crossings: tuple[float, int, float]) -> dict:
    rows = [
        {"error": error, "train_error": error, "updates": u, "seconds": s, "test_error": error + 1}
        for error, u, s in crossings
    ]
    return {"optimizer": optimizer, "seed": seed, "updates": updates, "cpu_seconds": seconds, "reached": rows}


RECORDS = [
    reached("kfac", 0, 50, 9.0, (10.0, 20, 4.0), (8.0, 40, 8.0)),
    reached("kfac", 1, 50, 9.0, (10.0, 30, 6.0), (8.0, 50, 9.0)),
    reached("kfac", 2, 50, 9.0, (10.0, 25, 5.0)),
    reached("adam", 0, 1000, 20.0, (10.0, 500, 10.0)),
    reached("adam", 1, 1000, 20.0, (10.0, 750, 15.0), (8.0, 900, 18.0)),
    reached("adam", 2, 1000, 20.0, (10.0, 800, 16.0)),
]


def test_first_at_takes_the_first_row_that_is_low_enough():
    rows = [{"train_error": e, "n": n} for n, e in enumerate((9.0, 5.0, 6.0, 4.0))]
    assert first_at(rows, 6.0) == rows[1]
    assert first_at(rows, 4.0) == rows[3]
    assert first_at(rows, 3.9) is None


def test_the_median_counts_runs_that_did_not_get_there_as_last():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([3.0, None, 2.0]) == 3.0
    assert median([None, None, 2.0]) is None
    assert median([]) is None


def test_ratio_of_what_is_missing_is_missing():
    assert ratio(6.0, 4.0) == 1.5
    assert ratio(None, 1.0) is ratio(1.0, None) is ratio(1.0, 0) is None


def test_cells_have_three_digits():
    cells = [report.cell(v) for v in (1.23456, 1234.5, 0.0005, 12, None, math.nan, True, False, "a")]
    assert cells == ["1.23", "1234", "0.0005", "12", "–", "–", "yes", "**no**", "a"]


def test_medians_and_ratios_of_runs():
    found = convergence.medians(RECORDS, "kfac", 8.0)
    assert (found["updates"], found["seconds"], found["test_error"]) == (50, 9.0, 9.0)
    assert convergence.medians(RECORDS, "adam", 8.0)["updates"] is None
    assert convergence.fewer(RECORDS, 10.0, "updates", "adam") == (750 / 25, "30")
    assert convergence.fewer(RECORDS, 10.0, "seconds", "adam") == (3.0, "3")
    assert convergence.fewer(RECORDS, 8.0, "seconds", "adam") == (20.0 / 9.0, "> 2.22")
    assert convergence.fewer(RECORDS, 5.0, "seconds", "adam") == (None, "–")


def test_targets_are_met_from_the_number_on():
    records = [*RECORDS, *(r | {"optimizer": "nesterov"} for r in RECORDS if r["optimizer"] == "adam")]
    lines = well_formed(convergence.against_targets(records, "curves"))
    assert [line[1] for line in lines[1:]] == ["30", "3", "30", "3", "> 2.22"]
    assert [line[3] for line in lines[1:]] == ["yes", "yes", "yes", "yes", "**no**"]
    assert [line[5] for line in lines[1:]] == ["–", "yes", "–", "–", "**no**"]


def test_convergence_records_the_first_evaluation_at_each_error(digits):
    records, settings = convergence.measure(digits, [0], {"kfac": 60.0, "adam": 60.0}, errors=(100.0, 6.0))
    assert [(r["optimizer"], r["over"]) for r in records] == [("kfac", "stopped"), ("adam", "stopped")]
    kfac = records[0]["reached"]
    assert [row["error"] for row in kfac] == [100.0, 6.0]
    assert kfac[0]["updates"] == 1 and kfac[1]["updates"] > 1
    assert all(row["train_error"] <= row["error"] for row in kfac)
    assert settings["kfac"]["in force"]["periods"].startswith("Periods(")
    assert len(well_formed(convergence.crossings(records))) == len(well_formed(convergence.ratios(records)))


def test_a_run_ends_when_the_last_error_is_reached(digits):
    records, _ = convergence.measure(digits, [0], {"kfac": 30.0}, errors=(100.0,))
    assert records[0]["over"] == "stopped" and records[0]["updates"] == 1


def test_robustness_sees_what_an_update_does_to_its_batch(digits):
    record, settings = robustness.measure(digits, "tanh", 0, 0.5)
    assert record["updates"] >= 1 and record["not_finite"] == 0 and record["over"] == ""
    assert 0 < record["worst_rise"] <= robustness.RISE
    assert len(well_formed(robustness.summary([record, record | {"seed": 1, "held": False}]))) == 3
    assert "periods" in settings["in force"]


@pytest.mark.parametrize(
    "bad",
    [{"not_finite": 1}, {"worst_rise": 1.06}, {"rejected": 0.11}, {"of_constant": 0.9}, {"of_constant": math.nan}],
)
def test_a_run_holds_only_with_all_that_is_wanted(bad):
    good = {"not_finite": 0, "worst_rise": 1.05, "rejected": 0.1, "of_constant": 0.89}
    assert robustness.held(good) and not robustness.held(good | bad)


def test_an_accepted_update_that_raises_the_loss_is_seen(digits):
    competitor = enter("kfac", digits)
    watch = robustness.Watch(competitor, digits)
    loss = watch.step(digits.x_train, digits.y_train)
    with torch.no_grad():
        for parameter in competitor.model.parameters():
            parameter.add_(1.0)
        watch.after()
        after = digits.likelihood.nll(competitor.model(digits.x_train), digits.y_train)
    assert watch.worst_rise == pytest.approx(float(after / loss), rel=1e-5) and watch.worst_rise > robustness.RISE


def test_the_best_constant_is_the_mean_image(digits):
    x = digits.x_train
    assert robustness.constant_error(digits) == pytest.approx(float(x.var(dim=0, correction=0).sum()), rel=1e-5)


def test_setting_up_the_chain_is_compared_with_the_dense_inverse():
    row = chain_setup.measure("the middle 4 layers", blocks=2, hidden=(3, 2, 3, 2, 3))
    assert row["parameters"] == 8 + 9 + 8 + 9 and len(row["ratio"]) == 2
    assert well_formed(chain_setup.setup_table([row]))[1][1] == "34"


def test_operations_are_counted_beside_measured_time(digits):
    row, settings = operations.measure(digits, 64, ["kfac", "kfac-ekfac"], blocks=1)
    lines = well_formed(operations.operations_table([row]))
    assert lines[-1][0] == "measured" and lines[-2][0] == "counted, all"
    kfac: Any = enter("kfac", digits).optimizer
    assert row["kfac"]["ratio counted"] == pytest.approx(operations.counted(kfac, 64).ratio)
    assert 1 < row["kfac"]["ratio counted"] < row["kfac-ekfac"]["ratio counted"] < 20
    assert all(r > 0 for name in ("kfac", "kfac-ekfac") for r in row[name]["ratio measured"])
    assert "damping" in settings["in force"]


def test_thesis_cost_measures_every_optimiser(digits):
    row = thesis_cost.measure(digits, 32, every=2, blocks=2)
    assert set(row["ratios"]) == set(thesis_cost.TARGETS) and len(row["ratios"]["acp"]) == 2
    lines = well_formed(thesis_cost.cost_table([row, {**row, "task": "mnist", "m": 1000, "every": 100}]))
    assert [line[-2] for line in lines[1:7]] == ["–"] * 6 and lines[7][-2] == "1.05"


def test_update_cost_covers_whole_periods(digits):
    row, settings = update_cost.measure(digits, 32, blocks=2)
    kfac: Any = enter("kfac", digits).optimizer
    assert row["updates_of_a_block"] % kfac.periods.inverses == 0
    assert len(row["kfac / sgd"]) == 2 and all(r > 0 for r in row["kfac / sgd"])
    assert (
        all(r > 0 for r in row["kfac-tridiagonal / sgd"])
        and len(well_formed(update_cost.tridiagonal_table([row]))) == 2
    )
    assert len(well_formed(update_cost.cost_table([row]))) == len(well_formed(update_cost.sgd_table([row]))) == 2
    assert "damping" in settings["in force"]


def test_updates_of_the_yardsticks_are_the_same(digits):
    """torch's SGD and the fused kernel by hand make the same update."""
    ends = []
    for update in (update_cost.torch_sgd, update_cost.by_hand):
        models = []
        step = update_cost.first_order(digits, lambda model, u=update, m=models: m.append(model) or u(model))
        for _ in range(3):
            step(digits.x_train[:50], digits.x_train[:50])
        ends.append(torch.nn.utils.parameters_to_vector(models[0].parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_memory_counts_at_least_gradients_and_state(digits):
    bytes_of_parameters = sum(4 * p.numel() for p in digits.make_model(seed=0, activation="tanh").parameters())
    peak, before, settings = memory.peak(digits, "adam", 20)
    assert 3 * bytes_of_parameters <= peak < 4 * bytes_of_parameters
    assert before == bytes_of_parameters + digits.x_train.nbytes and settings["lr"] > 0
    row = {"task": "digits", "m": 20, "kfac": 3 * memory.MIB, "adam": 2 * memory.MIB, "before": 2 * memory.MIB}
    assert well_formed(memory.memory_table([row]))[1][4:] == ["1.5", "1.5", "yes", "2", "1.25"]


def test_layer_cost_in_passes_and_steps():
    found = layer_cost.measure(4, 4, 1, shapes=((2, 2, 3, 4),))
    assert len(well_formed(layer_cost.layer_table(found["layers"]))) == 2
    lines = well_formed(layer_cost.step_table(found["steps"]))
    assert len(lines) == 6 and [float(cell) for cell in lines[1][1:]] == [1, 1]


def test_gradient_covariance_in_passes():
    seconds = gradient_covariance.measure(4, (12, 6, 2))
    assert len(well_formed(fisher_products.product_table(seconds))) == 1 + len(seconds)


def test_fisher_products_in_passes():
    seconds = fisher_products.measure(4, (12, 6, 2))
    assert len(well_formed(fisher_products.product_table(seconds))) == 1 + len(seconds)


def test_run_cpu_says_why_it_is_over(digits):
    runner = Runner(enter("adam", digits), digits)
    assert run_cpu(runner, 100.0, lambda r: r.update == 3) == "stopped" and runner.update == 3
    assert run_cpu(runner, 0.0) == ""
    assert run_cpu(Runner(_failing(digits), digits), 100.0) != ""


def _failing(task):
    competitor = enter("adam", task)
    competitor.step = lambda x, y: torch.tensor(math.nan)
    return competitor


def test_the_sweep_ranks_and_writes(digits, tmp_path):
    grid = {"adam": [{"lr": 1e-3, "batch_size": 20}, {"lr": math.inf, "batch_size": 20}]}
    rows = sweep.sweep(digits, 0.1, grid)
    assert [row["lr"] for row in rows] == [1e-3, math.inf] and rows[1]["note"] == "diverged"
    record = sweep.recipe({"digits": rows}, {"digits": 0.1}, "the command")
    report.write_json(tmp_path / "r.json", record)
    assert json.loads((tmp_path / "r.json").read_text())["results"] == finite(record["results"])
    assert record["digits"] == {"adam": {"lr": 1e-3, "batch_size": 20}} and record["command"] == "the command"
    assert len(well_formed(sweep.tables(record)[1])) == 3


def test_the_sweep_says_when_a_winner_is_at_the_edge():
    tried = ((3, 20), (1, 10), (2, 10), (3, 10))
    rows = [{"optimizer": "adam", "lr": lr, "batch_size": m} for lr, m in tried]
    assert sweep.at_edge(rows) == ["adam lr = 3 (largest)", "adam batch_size = 20 (largest)"]
    assert sweep.at_edge([{**rows[2], "batch_size": 5}, {**rows[1], "batch_size": 5}, *rows]) == [
        "adam batch_size = 5 (smallest)"
    ]


def test_the_recipe_of_the_baselines_is_what_the_sweep_found():
    record = json.loads((RECIPES / "baselines.json").read_text())
    assert record["command"].startswith("python -m benchmarks sweep")
    for task in sweep.BUDGETS:
        assert record["cpu_seconds"][task] == sweep.BUDGETS[task]
        for name, tried in sweep.GRID.items():
            rows = [row for row in record["results"][task] if row["optimizer"] == name]
            assert sorted((r["lr"], r["batch_size"]) for r in rows) == sorted(tuple(s.values()) for s in tried)
            finished = [row for row in rows if not row["note"]]
            winner = min(finished, key=lambda row: row["train_error"])
            assert record[task][name] == {"lr": winner["lr"], "batch_size": winner["batch_size"]}
            assert all(row["cpu_seconds"] >= sweep.BUDGETS[task] for row in finished)
    assert record["faces"] == record["mnist"]


def test_results_are_saved_as_text_and_data(tmp_path, capsys):
    settings = {"arguments": {}, "batch_size": {"start": 5}, "in force": {"periods": "Periods()"}}
    numbers = {"x": math.inf, "rows": [1]}
    report.save(
        "n", "T", ["text"], numbers, command="python -m benchmarks n", settings=settings, folder=tmp_path / "new"
    )
    text = (tmp_path / "new" / "n.md").read_text()
    assert (
        text.startswith("## T\n\ntext\n\n") and "- periods: `Periods()`" in text and "`python -m benchmarks n`" in text
    )
    assert text.strip() in capsys.readouterr().out
    saved = json.loads((tmp_path / "new" / "n.json").read_text())
    assert saved["x"] is None and saved["kfac"] == settings and saved["environment"]["torch"] == torch.__version__


def test_the_page_is_made_of_the_results():
    page = docs.PAGE.read_text(encoding="utf-8")
    assert page == docs.assemble(report.RESULTS), "run `python -m benchmarks docs`"


def test_every_name_has_its_options():
    for name in NAMES:
        with pytest.raises(SystemExit) as stopped:
            run([name, "--help"])
        assert stopped.value.code == 0


@pytest.mark.parametrize("arguments", [["speed"], [], ["convergence", "faces"], ["robustness", "--seeds", "0"]])
def test_bad_arguments_exit_2_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_task_is_one_line(capsys):
    assert run(["update-cost", "--tasks", "letters"]) == 2
    error = capsys.readouterr().err
    assert "letters" in error and error.count("\n") == 1


def test_all_goes_on_after_a_failure(monkeypatch):
    import benchmarks.__main__ as command

    seen = []

    def fail(options: argparse.Namespace) -> None:
        seen.append(options.command)
        raise ValueError("no data")

    for name in NAMES:
        monkeypatch.setattr(f"benchmarks.{name.replace('-', '_')}.main", fail)
    assert command.run(["all"]) == 2
    assert len(seen) == len(command.ALL) and "python -m benchmarks convergence mnist" in seen


def test_truncated_newton_steps_and_preconditioners():
    seconds = truncated_newton.step_cost(4, (12, 6, 2))
    assert len(well_formed(truncated_newton.step_table(seconds))) == 1 + len(seconds)
    history = truncated_newton.History()
    history.values = [0.5, 0.05, 0.2]
    assert [history.first_below(r) for r in (0.6, 0.1, 0.01)] == [1, 2, None]
    found = {"none": {"0.1": 10, "0.01": 30, "0.001": None}, "K-FAC": {"0.1": 4, "0.01": 12, "0.001": 20}}
    assert "4 (0.40)" in truncated_newton.iteration_table(found)
