"""Tables fit 80 columns; pictures and report hold what the records say and need nothing from elsewhere."""

import base64
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from natgrad_lab import plots, report
from natgrad_lab.display import count, notes, number, tables, verdict
from natgrad_lab.race import targets
from natgrad_lab.records import End, Evaluation, Race, Trace

PNG = b"\x89PNG\r\n\x1a\n"


def trace(name: str, speed: float, rate: int, reason: str = "finished", last: float = 55.0) -> Trace:
    """Error 80 exp(-speed sqrt(t)) at the seconds t, `rate` updates a second."""
    made = Trace(name, {"lr": 0.001})
    for i in range(30):
        t = last * (i / 29) ** 2
        error = 80 * math.exp(-speed * math.sqrt(t))
        made.evaluations.append(
            Evaluation(
                name, int(rate * t), int(rate * t) * 250, t, t, 250, error, error, error, error * 1.1, error * 1.05
            )
        )
    e = made.evaluations[-1]
    finished = reason == "finished"
    errors = (e.train_error, e.test_error) if finished else (math.nan, math.nan)
    peak = 123_000_000 if finished else None
    made.end = End(
        name, reason, "" if finished else "the loss was nan", e.update, e.examples, last, last, *errors, peak
    )
    return made


def race_of(*traces: Trace) -> Race:
    configuration = {
        "task": "curves",
        "description": "Synthetic curves.",
        "train_cases": 20000,
        "test_cases": 10000,
        "parameters": 842340,
        "activation": "tanh",
        "seconds": 55.0,
        "seed": 0,
        "averaging": 0.99,
        "evaluation_cases": 2000,
        "device": "cpu",
        "environment": {"torch": "2.13.0", "threads": 1, "command": None},
    }
    return Race(configuration, {t.name: t for t in traces})


@pytest.fixture
def race() -> Race:
    return race_of(
        trace("kfac", 0.5, 4),
        trace("adam", 0.25, 60),
        trace("nesterov", 0.2, 65),
        trace("kfac-paper", 0.35, 3),
        trace("adamw", 0.24, 55),
        trace("sgd", 0.1, 70, "diverged", last=12.0),
    )


def printed(race: Race, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    for table in tables(race):
        console.print(table)
    return console.export_text()


def test_tables_fit_80_columns_without_cutting_anything(race: Race) -> None:
    text = printed(race)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for name in race.traces:
        assert len(re.findall(rf"^ ?{name} ", text, re.MULTILINE)) == 2
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("adam "))
    adam = race.traces["adam"].end
    assert adam is not None
    assert row == [
        "adam",
        "3",
        "300",
        "825",
        "000",
        "55.0",
        number(adam.train_error),
        number(adam.test_error),
        "123",
        "MB",
    ]
    assert "diverged" in text


def test_targets_are_those_reached(race: Race) -> None:
    assert targets(race) == [20.0, 15.0, 10.0, 8.0, 5.0, 3.0]  # the best ends at 80 exp(-0.5 sqrt 55) = 1.96
    kfac = race.traces["kfac"]
    text = printed(race)
    at = kfac.first_at(3.0)
    assert at is not None
    assert f"{at.seconds:.1f} s" in text


def test_targets_of_a_task_without_a_list_are_round_numbers(race: Race) -> None:
    race.configuration["task"] = "something new"
    assert targets(race) == [15.0, 10.0, 8.0, 5.0, 3.0, 2.0]


def test_verdict_compares_with_the_next_at_an_error_both_reached() -> None:
    race = race_of(trace("kfac", 0.5, 4), trace("adam", 0.25, 60), trace("nesterov", 0.2, 65))
    kfac, adam = race.traces["kfac"].first_at(15.0), race.traces["adam"].first_at(15.0)
    assert kfac is not None
    assert adam is not None
    text = verdict(race)
    assert text.startswith("kfac is ahead with training error 1.962 (adam 12.53, nesterov 18.15).")
    assert f"Error 15 took it {kfac.seconds:.1f} s and {count(kfac.update)} updates" in text
    assert f"the next, adam, {adam.seconds:.1f} s ({adam.seconds / kfac.seconds:.1f} times)" in text


def test_diverged_runs_never_lead() -> None:
    race = race_of(trace("adam", 0.9, 60, "diverged"), trace("kfac", 0.2, 4))
    assert verdict(race).startswith("kfac is ahead")
    assert notes(race) == ["adam diverged after 3300 updates: the loss was nan"]


def test_race_stopped_before_anything_was_measured_still_prints(tmp_path: Path) -> None:
    empty = race_of(Trace("kfac", {}), Trace("adam", {}))
    assert "kfac" in printed(empty)
    assert verdict(empty) == "No optimiser has a result."
    assert report.write(empty, tmp_path).exists()


def test_report_is_self_contained(race: Race, tmp_path: Path) -> None:
    race.configuration["description"] = 'Curves <b> & "quotes".'
    path = report.write(race, tmp_path)
    html = path.read_text()
    assert path.name == "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["error-seconds.png", "error-updates.png", "report.html"]
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert len(sources) == 4  # two pictures, light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(base64.b64decode(source.partition(",")[2]).startswith(PNG) for source in sources)
    assert "http" not in html
    assert "url(" not in html
    assert "<script" not in html
    assert "prefers-color-scheme: dark" in html
    assert "Curves &lt;b&gt; &amp; &quot;quotes&quot;." in html
    assert "$" not in re.sub(r"base64,[^\"]*", "", html)
    assert verdict(race) in html


def test_pictures_are_png_with_labels(race: Race, tmp_path: Path) -> None:
    for path in plots.write(race, tmp_path):
        assert path.read_bytes().startswith(PNG)
    for against, label in (("seconds", "seconds of training"), ("updates", "updates")):
        (axes,) = plots.draw(race, against).axes
        assert axes.get_xlabel() == label
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        texts = [text.get_text() for text in axes.texts]
        assert all(any(text.startswith(f"{name} ") for text in texts) for name in race.traces)
        assert len({line.get_color() for line in axes.lines}) == len(race.traces)


def test_end_labels_do_not_overlap() -> None:
    names = ("kfac", "adam", "nesterov", "kfac-paper", "adamw", "sgd")
    race = race_of(*(trace(name, 0.2 + 0.001 * i, 50) for i, name in enumerate(names)))
    figure = plots.draw(race, "seconds")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().split()[0] in names]
    assert len(boxes) == len(names)
    assert [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)] == []
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.width for box in boxes)


def test_numbers_are_shown_with_four_digits() -> None:
    shown = [number(v) for v in (123.456, 12.3456, 1.23456, 0.123456, 1e-5, math.nan)]
    assert shown == ["123.5", "12.35", "1.235", "0.1235", "1e-05", "–"]
    assert [count(v) for v in (999, 12345, 12_345_678)] == ["999", "12 345", "12.35M"]


def test_no_two_optimisers_of_a_race_look_alike() -> None:
    styles = plots.styles_of(["kfac", "eigen-adam", "adam", "tonga", "nesterov"])
    assert styles["kfac"] == ("#0072B2", "o") and styles["adam"] == ("#D55E00", "s")
    for look in zip(*styles.values(), strict=True):
        assert len(set(look)) == 5
