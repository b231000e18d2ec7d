"""The self-contained report of a search: Optuna's own plots, the best trials and everything needed to repeat it."""

import base64
import io
import json
import warnings
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import optuna
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from natgrad_lab.display import number
from natgrad_lab.records import environment, finite, write_json
from natgrad_lab.report import STYLE
from natgrad_lab.search.display import best, cells, headings, verdict
from natgrad_lab.search.study import ATTRIBUTE, results

NAME, RECORDS = "report.html", "trials.json"
SHOWN = 20


def write(study: Study, folder: Path) -> Path:
    """Write `report.html` and `trials.json`; returns the path of the report."""
    write_json(folder / RECORDS, record(study))
    path = folder / NAME
    path.write_text(render(study), encoding="utf-8")
    return path


def record(study: Study) -> dict[str, Any]:
    """All finished trials as plain values."""
    return {
        "study": study.study_name,
        **study.user_attrs,
        "environment": environment() | {"optuna": optuna.__version__},
        "trials": [
            {"number": t.number, "state": t.state.name.lower(), "error": t.value, "params": t.params, **t.user_attrs}
            for t in results(study)
        ],
    }


def render(study: Study) -> str:
    """The whole page as text; nothing in it is loaded from elsewhere."""
    about = study.user_attrs[ATTRIBUTE]
    plots = [(title, _picture(draw, title)) for title, draw in _plots(study)]
    machine = {k: v for k, v in (environment() | {"optuna": optuna.__version__}).items() if v is not None}
    return Template(_PAGE).substitute(
        style=STYLE.rstrip(),
        title=escape(f"Search: {about['optimizer']} on {about['task'].upper()}"),
        verdict=escape(verdict(study)),
        table=_table(study),
        plots="".join(f"<h2>{escape(title)}</h2>{picture}" for title, picture in plots if picture),
        method=escape(_method(about)),
        space=_pairs({name: _readable(text) for name, text in about["space"].items()}),
        failures=_failures(study),
        environment=_pairs(machine),
        records=RECORDS,
    )


def _method(about: dict[str, Any]) -> str:
    each = f"{about['seconds']:g} seconds of updates" if about["seconds"] is not None else f"{about['updates']} updates"
    return (
        f"Every trial starts from the same parameters (seed {about['seed']}, {about['activation']} units) and gets "
        f"{each} with {about['optimizer']}. Its error is the mean over training cases of the summed squared difference "
        "between target and output, of the last iterate or of the running average of the iterates, whichever is "
        "smaller, on at most 2000 fixed cases. The test error belongs to the same parameters and was not searched for. "
        "The best of many trials is a little too good: it was chosen for its error."
    )


def _plots(study: Study) -> list[tuple[str, Callable[[], Any]]]:
    """Optuna's plots that the study has enough trials for."""
    draw = optuna.visualization.matplotlib
    complete = [t for t in results(study) if t.state == TrialState.COMPLETE]
    varying = [name for name in complete[0].params if len({t.params[name] for t in complete}) > 1] if complete else []
    found: list[tuple[str, Callable[[], Any]]] = []
    label = {"target_name": "training error"}
    if complete:
        found.append(("Errors in the order of trials", lambda: draw.plot_optimization_history(study, **label)))
        found.append(("Error against each parameter", lambda: draw.plot_slice(study, **label)))
    if len(varying) > 1:
        found.append(("Error over pairs of parameters", lambda: draw.plot_contour(study, params=varying, **label)))
        found.append(("Parallel coordinates", lambda: draw.plot_parallel_coordinate(study, **label)))
        found.append(("Which parameters matter", lambda: draw.plot_param_importances(study, **label)))
    if len(complete) > 1:
        found.append(("Share of trials below an error", lambda: draw.plot_edf(study, **label)))
    return found


def _picture(draw: Callable[[], Any], title: str) -> str:
    """A plot of Optuna's as an image in the page; nothing where Optuna cannot draw it (too few different results)."""
    from matplotlib import pyplot

    backend = matplotlib.get_backend()
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")
        pyplot.switch_backend("agg")
        try:
            drawn = draw()
            axes = drawn.flat[0] if hasattr(drawn, "flat") else drawn
            figure = axes.figure
            figure.set_size_inches(9.0, 5.0 if not _square(drawn) else 8.5)
            for one in figure.axes:
                _plain_ticks(one.xaxis)
                _plain_ticks(one.yaxis)
            figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        except (ValueError, RuntimeError, ZeroDivisionError):
            return ""
        finally:
            pyplot.close("all")
            if backend.lower() != "agg":
                pyplot.switch_backend(backend)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(title)}; the records hold the same numbers.">'


def _plain_ticks(axis: Axis) -> None:
    """Fewer labels on a logarithmic axis: powers of ten, or 1, 2 and 5 where there are not enough of them."""
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300.0 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _square(drawn: Any) -> bool:
    """Whether the plot is a matrix of panels."""
    return getattr(drawn, "ndim", 0) == 2


def _table(study: Study) -> str:
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in headings(study))
    rows = []
    for i, trial in enumerate(best(study, SHOWN)):
        first, *rest = (escape(cell) for cell in cells(trial, study))
        kind = ' class="leader"' if i == 0 else ""
        rows.append(f"<tr{kind}><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _failures(study: Study) -> str:
    failed = [t for t in results(study) if t.state != TrialState.COMPLETE]
    if not failed:
        return ""
    rows = {f"trial {t.number}": f"{t.user_attrs.get('failure') or t.state.name.lower()} – {_short(t)}" for t in failed}
    return f"<details><summary>Trials without a result: {len(failed)}</summary>{_pairs(rows)}</details>"


def _short(trial: FrozenTrial) -> str:
    values = ((k, number(v) if isinstance(v, float) else v) for k, v in trial.params.items())
    return ", ".join(f"{name} {value}" for name, value in values)


def _readable(text: str) -> str:
    """A distribution as it stands in the study, in words."""
    about = json.loads(text)["attributes"]
    if "choices" in about:
        return ", ".join(str(choice) for choice in about["choices"])
    return f"{about['low']:g} to {about['high']:g}{', logarithmic' if about['log'] else ''}"


def _pairs(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><th scope=row>{escape(str(k))}</th><td class=text>{escape(str(finite(v)))}</td></tr>"
        for k, v in values.items()
    )
    return "<table>" + "".join(rows) + "</table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style
img { background: #ffffff; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="verdict">$verdict</p>
$table
$plots
<h2>How it was measured</h2>
<p>$method</p>
<details open><summary>What was searched</summary>$space</details>
$failures
<details><summary>Machine and versions</summary>$environment</details>
<p class="soft">Every number is in <code>$records</code>, beside this file.</p>
</body>
</html>
"""
