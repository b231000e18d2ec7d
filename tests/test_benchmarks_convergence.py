"""Several optimisers of ours in the benchmark of convergence."""

from typing import Any

from benchmarks import convergence


def run(name: str, seed: int, *at: tuple[float, int, float]) -> dict[str, Any]:
    """A record: (error, updates, seconds) of what was reached."""
    rows = [{"error": e, "updates": u, "seconds": s, "train_error": e, "test_error": e} for e, u, s in at]
    return {"optimizer": name, "seed": seed, "updates": 1000, "cpu_seconds": 20.0, "over": "", "reached": rows}


def cells(table: str) -> list[list[str]]:
    """Rows of a Markdown table without its rule."""
    lines = [line for line in table.splitlines() if not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_targets_of_another_optimiser_of_ours_are_its_own() -> None:
    """EigenAdam's ratios come from its own runs, K-FAC's targets appear only where it took part."""
    records = [run("eigen-adam", seed, (10.0, 50, 4.0), (8.0, 60, 5.0)) for seed in range(3)]
    records += [run("adam", 0, (10.0, 500, 10.0)), run("adam", 1, (10.0, 750, 15.0)), run("adam", 2, (10.0, 800, 16.0))]
    lines = cells(convergence.against_targets(records, "curves"))[1:]
    assert [line[0] for line in lines] == [
        "Adam / EigenAdam, seconds to error 10",
        "Adam / EigenAdam, seconds to error 8",
    ]
    assert [line[1] for line in lines] == ["3.75", "> 4"] and [line[3] for line in lines] == ["yes", "yes"]
    header, row = cells(convergence.ratios(records, (10.0,), ours="eigen-adam"))
    assert header[1:] == ["Adam / EigenAdam, updates", "Adam / EigenAdam, seconds"] and row[1:] == ["15", "3.75"]
