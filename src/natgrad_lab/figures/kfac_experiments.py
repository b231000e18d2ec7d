"""Figures 7, 9, 10 and 11 of Martens & Grosse (2015) [KFAC], from records."""

import math
import re
from statistics import median
from typing import Any

from natgrad_lab.figures.drawing import COLOURS, INK, MARKERS, Drawing, canvas, draws
from natgrad_lab.plots import plain_ticks
from natgrad_lab.recipes.run import Record

LABELS = {"block_tridiagonal": "tri", "block_diagonal": "diag"}


@draws("kfac-fig7")
def figure_7(record: Record) -> Drawing:
    """Improvement against γ: raw Δ, scaled, scaled with momentum."""
    c = record.configuration
    figure, axes = canvas(1, len(c["structures"]), width=10, height=4.2, sharey=True)
    rows, largest = [], 0.0
    for one, structure in zip(axes[0], c["structures"], strict=True):
        best = {}
        for i, (name, values) in enumerate(record.results[structure].items()):
            points = [(g, v) for g, v in zip(c["gammas"], values, strict=True) if v is not None]
            one.plot(*zip(*points, strict=True), color=COLOURS[i], marker=MARKERS[i], markersize=4, label=name)
            best[name] = max(points, key=lambda point: point[1])
        largest = max(largest, *(abs(value) for _, value in best.values()))
        one.axhline(0, color=INK["soft"], linewidth=0.8)
        one.set(xscale="log", xlabel="γ")
        one.set_title(structure.replace("_", "-"), color=INK["ink"], fontsize=11, loc="left")
        for name, (gamma, value) in best.items():
            rows.append((f"{LABELS[structure]}: best improvement of {name}, at γ", "–", f"{value:.3g} at {gamma:.2g}"))
    axes[0][0].set(ylabel="h(θ) − h(θ + δ)", ylim=(-0.4 * largest, 1.1 * largest))  # shared
    axes[0][0].legend(fontsize=9, frameon=False)
    return Drawing({"": figure}, rows)


@draws("kfac-fig9")
def figure_9(record: Record) -> Drawing:
    """Error per iteration (left) and per training case (right), a row for each method."""
    c = record.configuration
    figure, axes = canvas(len(c["methods"]), 2, width=10, height=2.7 * len(c["methods"]), sharey="row")
    rows = []
    for row, name in zip(axes, c["methods"], strict=True):
        found = {m: record.results[f"{name}, m = {m}"] for m in c["sizes"][name]}
        row[1].set_xscale("log")
        for i, (m, one) in enumerate(found.items()):
            for place, against in zip(row, ("update", "examples"), strict=True):
                _line(place, one, against, COLOURS[i], f"m = {m}")
        row[0].set_ylabel("training error", fontsize=9)
        row[0].set_title(name, color=INK["ink"], fontsize=11, loc="left")
        row[0].legend(fontsize=8, frameon=False)
        plain_ticks(row[0], "y")
        plain_ticks(row[1], "x", narrow=True)
        error = max(min(e for e in one["train_error"] if e is not None) for one in found.values())
        for m, one in found.items():
            updates = updates_to(one, error)
            assert updates is not None  # the error is one that every size reaches
            cases = f"{m * updates:,.0f}".replace(",", " ")
            text = f"{updates:.0f} updates, {cases} cases"
            rows.append((f"{name}, m = {m}: to error {error:.3g}", "–", text))
    for one, label in zip(axes[-1], ("iterations", "training cases"), strict=True):
        one.set_xlabel(label)
    return Drawing({"": figure}, rows)


@draws("kfac-fig10")
@draws("kfac-fig10-mnist")
@draws("kfac-fig10-faces")
def figure_10(record: Record) -> Drawing:
    """Error against CPU-seconds (figure 10) and against iterations (figure 11), all seeds."""
    c = record.configuration
    figures, rows = {}, []
    families = list(dict.fromkeys(_family(method) for method in c["methods"]))
    for suffix, against, label in (("time", "cpu_seconds", "CPU-seconds"), ("iterations", "update", "iterations")):
        figure, ((axes,),) = canvas(1, 1, width=8, height=4.6)
        axes.set(xscale="log", xlabel=label, ylabel="training error")
        for method in c["methods"]:
            colour = COLOURS[families.index(_family(method))]
            style = "-" if _family(method) == method or "tri" in method.lower() else "--"
            for j, found in enumerate(_seeds(record, method)):
                _line(axes, found, against, colour, method if j == 0 else None, style=style, faint=j > 0)
        plain_ticks(axes, "x")
        plain_ticks(axes, "y")
        axes.set_title(c["task"].upper(), color=INK["ink"], fontsize=11, loc="left")
        axes.legend(fontsize=8, frameon=False)
        figures[suffix] = figure
    for name, (tri, diag) in c["compared"].items():
        gains = [progress_gain(d, t) for t, d in zip(_seeds(record, tri), _seeds(record, diag), strict=True)]
        shown = sorted(gain for gain in gains if gain is not None)
        text = " ".join(f"{100 * gain:.0f} %" for gain in shown) or "–"
        if len(shown) > 1:
            text = f"{100 * median(shown):.0f} % (seeds: {text})"
        rows.append((f"N_diag / N_tri − 1, {name}", "25 to 40 %", text))
    for method in c["methods"]:
        for seed, found in zip(c["seeds"][method], _seeds(record, method), strict=True):
            rows.append((f"{method}, seed {seed}: last error", "–", _last(found)))
    return Drawing(figures, rows)


def _family(method: str) -> str:
    """What a method is called beside its structure."""
    return re.sub("blk-tridiag|blk-diag|block-tridiagonal|block-diagonal", "", method, flags=re.IGNORECASE)


def _seeds(record: Record, method: str) -> list[dict[str, Any]]:
    """A method's runs, in the order of the seeds."""
    return [record.results[f"{method}, seed {seed}"] for seed in record.configuration["seeds"][method]]


def progress_gain(slower: dict[str, Any], faster: dict[str, Any]) -> float | None:
    """The median of N_slower / N_faster − 1 over the errors that both reach in the later half of the slower run.

    N is the number of updates to an error, interpolated between evaluations on the logarithm of the error.
    """
    reached = [e for e in slower["train_error"][len(slower["train_error"]) // 2 :] if e is not None]
    pairs = [(updates_to(slower, e), updates_to(faster, e)) for e in reached]
    ratios = [a / b - 1 for a, b in pairs if a and b]
    return median(ratios) if ratios else None


def updates_to(found: dict[str, Any], error: float) -> float | None:
    """Updates to the first time at which the error is at most `error`; None if it never is."""
    points = [(u, e) for u, e in zip(found["update"], found["train_error"], strict=True) if e is not None and e > 0]
    for (u, e), (v, f) in zip(points, points[1:], strict=False):
        if f <= error < e:
            return u + (v - u) * math.log(e / error) / math.log(e / f)
    return float(points[0][0]) if points and points[0][1] <= error else None


def _line(
    axes: Any,
    found: dict[str, Any],
    against: str,
    colour: str,
    label: str | None,
    *,
    style: str = "-",
    faint: bool = False,
) -> None:
    rows = zip(found[against], found["train_error"], strict=True)
    first = 0 if axes.get_xscale() == "linear" else 1e-9  # update 0 has no place on a logarithmic axis
    points = [(x, e) for x, e in rows if e is not None and e > 0 and x >= first]
    axes.plot(
        *zip(*points, strict=True),
        color=colour,
        linewidth=1.6,
        linestyle=style,
        alpha=0.4 if faint else 1.0,
        label=label,
    )
    axes.set_yscale("log")


def _last(found: dict[str, Any]) -> str:
    """The last error; beside it the least one where the run lost a tenth of it again."""
    end = "" if found["end"] == "finished" else f", {found['end']}"
    errors, updates = found["train_error"], found["update"]
    least = min((e, u) for e, u in zip(errors, updates, strict=True) if e is not None)
    lost = f"; least {least[0]:.3g} after {least[1]}" if errors[-1] is None or errors[-1] > 1.1 * least[0] else ""
    last = "–" if errors[-1] is None else f"{errors[-1]:.3g}"
    return f"{last} after {updates[-1]}{end}{lost}"
