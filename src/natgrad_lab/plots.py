"""The two pictures of a race: error against seconds and against updates. They read records only."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from natgrad_lab.records import Evaluation, Race, Trace

# Okabe & Ito's palette: told apart with every common colour blindness; markers tell them apart without colour.
COLOURS = {
    "kfac": "#0072B2",
    "adam": "#D55E00",
    "nesterov": "#009E73",
    "kfac-paper": "#56B4E9",
    "kfac-ekfac": "#999999",
    "kfac-tridiagonal": "#F0E442",
    "adamw": "#CC79A7",
    "sgd": "#E69F00",
}
MARKERS = {
    "kfac": "o",
    "adam": "s",
    "nesterov": "^",
    "kfac-paper": "D",
    "kfac-ekfac": "X",
    "kfac-tridiagonal": "p",
    "adamw": "v",
    "sgd": "P",
}
SPARE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SPARE_MARKERS = ("o", "s", "^", "v", "P", "D")

THEMES = {
    "light": {"ink": "#1b1f24", "soft": "#6a737d", "grid": "#d8dee4", "ground": "#ffffff"},
    "dark": {"ink": "#e6edf3", "soft": "#9aa4af", "grid": "#343b44", "ground": "#14181d"},
}


def styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every optimiser: its own where it has one, else what no other in the race has."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for own, spare in ((COLOURS, SPARE_COLOURS), (MARKERS, SPARE_MARKERS)):
        taken = {own[name] for name in names if name in own}
        free = itertools.cycle([style for style in spare if style not in taken] or spare)
        for name in names:
            found[name].append(own[name] if name in own else next(free))
    return {name: (colour, marker) for name, (colour, marker) in found.items()}


def draw(race: Race, against: str, theme: str = "light") -> Figure:
    """One picture.

    Args:
        race: The records.
        against: "seconds" or "updates".
        theme: "light" or "dark".

    Solid lines are the training error, thin dashed lines the test error of the same parameters.
    """
    colours = THEMES[theme]
    figure = Figure(figsize=(8, 4.8), dpi=150, facecolor=colours["ground"], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=colours["ground"])
    of: Callable[[Evaluation], float] = (lambda e: e.seconds) if against == "seconds" else (lambda e: float(e.update))
    ends: list[tuple[float, float, str, str]] = []
    styles = styles_of(list(race.traces))
    for trace in race.traces.values():
        points = _points(trace, of)
        if not points:
            continue
        colour, marker = styles[trace.name]
        x, train, test = zip(*points, strict=True)
        axes.plot(x, test, color=colour, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.85)
        axes.plot(x, train, color=colour, linewidth=2.2, marker=marker, markersize=6, markevery=max(1, len(x) // 8))
        if trace.end is not None and trace.end.reason == "diverged":
            axes.plot(x[-1], train[-1], color=colour, marker="x", markersize=11, markeredgewidth=2.5)
        # The label has the table's number, on all cases; the line was measured on some of them.
        final = trace.train_error if math.isfinite(trace.train_error) else train[-1]
        ends.append((x[-1], train[-1], f"{trace.name} {shown(final)}", colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes, "x")
    plain_ticks(axes, "y")
    style_axes(axes, colours)
    _label_ends(axes, ends)
    axes.set_xlabel("seconds of training" if against == "seconds" else "updates", color=colours["ink"], fontsize=11)
    axes.set_ylabel("reconstruction error", color=colours["ink"], fontsize=11)
    c = race.configuration
    axes.set_title(
        f"{c['task'].upper()}, {c['activation']} units, {c['seconds']:g} s each: error against {against}",
        color=colours["ink"],
        fontsize=12,
        loc="left",
        pad=22,
    )
    axes.text(
        0.0,
        1.02,
        "solid: training error, dashed: test error; the better of iterate and running average",
        transform=axes.transAxes,
        color=colours["soft"],
        fontsize=9,
    )
    return figure


def write(race: Race, folder: Path) -> list[Path]:
    """Write `error-seconds.png` and `error-updates.png` into `folder`."""
    paths = []
    for against in ("seconds", "updates"):
        path = folder / f"error-{against}.png"
        with matplotlib.rc_context({"savefig.facecolor": "auto"}):
            draw(race, against).savefig(path)
        paths.append(path)
    return paths


def shown(value: float) -> str:
    """A number with four significant digits at most, without an exponent where it can be helped."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, min(4, 3 - math.floor(math.log10(abs(value))))) if value else 0
        return f"{value:.{digits}f}"
    return f"{value:.3g}"


def _points(trace: Trace, of: Callable[[Evaluation], float]) -> list[tuple[float, float, float]]:
    """(x, training error, test error) of the evaluations after the start that a logarithmic axis can show."""
    rows = [(of(e), e.train_error, e.test_error) for e in trace.evaluations if e.update > 0]
    return [row for row in rows if row[0] > 0 and all(math.isfinite(v) and v > 0 for v in row)]


def plain_ticks(axes: matplotlib.axes.Axes, which: str, *, narrow: bool = False) -> None:
    """Plain numbers (1, 2, 5, 10 …) on a logarithmic axis, fewer of them the more decades it spans.

    `narrow`: powers of ten alone, where there is little room for long numbers.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits = (1,) if narrow or decades > 4 else (1, 2, 5) if decades > 0.8 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axis.set_major_locator(FixedLocator([digit * 10.0**power for power in powers for digit in digits]))
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,.12g}".replace(",", " ")))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_view_interval(low, high, ignore=True)


def style_axes(axes: matplotlib.axes.Axes, colours: dict[str, str]) -> None:
    """Grid behind the lines, no frame on top and right."""
    axes.grid(True, color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], labelsize=10, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colours["soft"])


def _label_ends(axes: matplotlib.axes.Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label beside the end of its line, pushed apart vertically where they would overlap."""
    if not ends:
        return
    gap = 0.055  # of the axes' height: one line of text
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((x, y))[1]), x, y, label, colour) for x, y, label, colour in ends)
    right = max(x for x, *_ in ends)
    heights: list[float] = []
    for height, *_ in placed:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    overflow = max(0.0, heights[-1] - 1.0)
    for height, (_, x, y, label, colour) in zip(heights, placed, strict=True):
        at_right = x >= 0.7 * right  # a short line (diverged, fewer updates) is labelled where it ends
        axes.annotate(
            label,
            xy=(1.0, height - overflow) if at_right else (x, y),
            xycoords="axes fraction" if at_right else "data",
            xytext=(8, 0) if at_right else (8, 6),
            textcoords="offset points",
            color=colour,
            fontsize=11,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )
