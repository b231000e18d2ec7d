"""The self-contained report of a race, from records only: one HTML file, pictures inside, for light and dark."""

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from natgrad_lab import plots
from natgrad_lab.display import best, count, notes, number, result_cells, verdict
from natgrad_lab.race import RECORDS, targets
from natgrad_lab.records import Race

NAME = "report.html"


def write(race: Race, folder: Path) -> Path:
    """Write the pictures and `report.html` into `folder`; returns the path of the report."""
    plots.write(race, folder)
    path = folder / NAME
    path.write_text(render(race), encoding="utf-8")
    return path


def render(race: Race) -> str:
    """The whole page as text; nothing in it is loaded from elsewhere."""
    c = race.configuration
    return Template(_PAGE).substitute(
        style=STYLE.rstrip(),
        title=escape(f"Race on {c['task'].upper()}"),
        verdict=escape(verdict(race)),
        notes="".join(f'<p class="note">{escape(line)}</p>' for line in notes(race)),
        result=_result(race),
        targets=_targets(race),
        seconds=_picture(race, "seconds"),
        updates=_picture(race, "updates"),
        setting=escape(
            f"{c['description'] or c['task']} {count(c['train_cases'])} training and {count(c['test_cases'])} test"
            f" cases; {count(c['parameters'])} parameters, {c['activation']} units."
        ),
        method=escape(_method(c)),
        settings=_settings(race),
        environment=_rows(
            {k: v for k, v in c["environment"].items() if v is not None} | {"seed": c["seed"], "device": c["device"]}
        ),
        records=RECORDS,
    )


def _method(c: dict[str, Any]) -> str:
    train, test = (min(c["evaluation_cases"], c[f"{part}_cases"]) for part in ("train", "test"))
    return (
        f"Every optimiser starts from the same parameters (seed {c['seed']}) and gets {c['seconds']:g} seconds of "
        "updates; they take turns. Drawing the mini-batch and the running average of the iterates are inside the "
        "clock, evaluation is outside. The error is the mean over cases of the summed squared difference between "
        f"target and output; it is that of the iterate or of the running average (decay {c['averaging']:g}), "
        f"whichever has the smaller training error. During the race it is measured on {train} fixed training and "
        f"{test} fixed test cases, at the end on all. An error counts as reached at the first evaluation that is "
        "not above it. Peak memory is that of tensors: model, optimiser state, mini-batch and temporaries of the "
        "first two updates of a fresh copy at the last batch size of the run."
    )


def _result(race: Race) -> str:
    headings = ("optimizer", "updates", "examples", "seconds", "training error", "test error", "peak memory")
    leader = best(race)
    rows = [
        _row([trace.name, *result_cells(trace)], "leader" if trace is leader else "") for trace in race.traces.values()
    ]
    return _table(headings, rows)


def _targets(race: Race) -> str:
    wanted = targets(race)
    if not wanted:
        return ""
    rows = []
    for trace in race.traces.values():
        at = [trace.first_at(error) for error in wanted]
        cells = [f"{e.seconds:.1f} s<small>{count(e.update)} updates</small>" if e else "–" for e in at]
        rows.append(
            f"<tr><th scope=row>{escape(trace.name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    title = "<h2>Seconds and updates to reach a training error</h2>"
    return title + _table(("error", *(number(error).rstrip("0").rstrip(".") for error in wanted)), rows)


def _settings(race: Race) -> str:
    rows = [
        f"<tr><th scope=row>{escape(name)}</th><td "
        f"class=text><code>{escape(json.dumps(trace.settings))}</code></td></tr>"
        for name, trace in race.traces.items()
    ]
    return "<table>" + "".join(rows) + "</table>"


def _rows(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><th scope=row>{escape(str(k))}</th><td class=text>{escape(str(v))}</td></tr>" for k, v in values.items()
    )
    return "<table>" + "".join(rows) + "</table>"


def _row(cells: list[str], kind: str = "") -> str:
    head, *rest = (escape(cell) for cell in cells)
    return f'<tr class="{kind}"><th scope=row>{head}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"


def _table(headings: tuple[str, ...], rows: list[str]) -> str:
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in headings)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _picture(race: Race, against: str) -> str:
    light, dark = (_data_uri(race, against, theme) for theme in ("light", "dark"))
    alternative = escape(
        f"Error of each optimiser against {against}, both axes logarithmic; the tables hold the same numbers."
    )
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{alternative}" width=1200 height=720></picture>'
    )


def _data_uri(race: Race, against: str, theme: str) -> str:
    buffer = io.BytesIO()
    plots.draw(race, against, theme).savefig(buffer, format="png", facecolor="auto")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


STYLE = """:root { --ink: #1b1f24; --soft: #5b6570; --line: #d8dee4; --ground: #ffffff; --mark: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #343b44; --ground: #14181d; --mark: #1c2733; }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { font-size: 1.15rem; margin: 0 0 1rem; }
.note { color: #b3541e; margin: .2rem 0; }
.soft, small { color: var(--soft); }
small { display: block; font-size: .82em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th[scope=row], th[scope=col]:first-child { text-align: left; }
th[scope=col] { font-weight: 600; color: var(--soft); }
th[scope=row] { font-weight: 600; }
td.text { text-align: left; overflow-wrap: anywhere; }
tr.leader { background: var(--mark); }
img { display: block; width: 100%; height: auto; margin: 1rem 0; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; font-weight: 600; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<h1>$title</h1>
<p class="verdict">$verdict</p>
$notes
<p class="soft">$setting</p>
$result
$targets
<h2>Error against seconds</h2>
$seconds
<h2>Error against updates</h2>
$updates
<h2>How it was measured</h2>
<p>$method</p>
<details open><summary>Settings of the optimisers</summary>$settings</details>
<details><summary>Machine and versions</summary>$environment</details>
<p class="soft">Every number comes from <code>$records</code>, beside this file.</p>
</body>
</html>
"""
