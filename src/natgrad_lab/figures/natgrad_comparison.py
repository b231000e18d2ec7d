"""Figures 2, 4 and 5 and table 1 of Pascanu & Bengio (2013) [NATGRAD], from records."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from natgrad_lab.figures.drawing import COLOURS, INK, Drawing, canvas, draws
from natgrad_lab.recipes.natgrad_comparison import (
    CONTROL,
    COVARIANCE,
    DIFFERENT,
    MSGD,
    SAME,
    UNLABELLED,
    method_of,
)
from natgrad_lab.recipes.run import Record

# Table 1: the nll of the training cases and the test error in percent. TFD's second column belongs to the same batch
# (sec. 8.7 has no other).
PRINTED: dict[str, dict[str, tuple[float, float]]] = {
    "natgrad-fig4": {
        MSGD: (0.0523, 5.22),
        UNLABELLED: (0.0017, 4.63),
        DIFFERENT: (0.0012, 4.89),
        SAME: (0.0023, 4.91),
        COVARIANCE: (0.0006, 4.74),
    },
    "natgrad-fig5": {DIFFERENT: (0.00010, 0.78), SAME: (0.0011, 0.82), COVARIANCE: (0.024, 1.07)},
    "natgrad-fig2": {UNLABELLED: (0.054, 16.96), SAME: (0.098, 18.87)},
}
TITLES = {"natgrad-fig4": "few digits", "natgrad-fig5": "all digits", "natgrad-fig2": "faces (paper: TFD)"}
LABELLED = 1000.0  # an axis over a smaller range has labels between the powers of ten
STYLES = {
    MSGD: (COLOURS[3], "D"),
    UNLABELLED: (COLOURS[0], "o"),
    DIFFERENT: (COLOURS[2], "^"),
    SAME: (COLOURS[1], "s"),
    CONTROL: (COLOURS[0], "x"),
    COVARIANCE: (COLOURS[4], "v"),
}


@draws("natgrad-fig2")
def figure_2(record: Record) -> Drawing:
    """Every division of the photographs thin, their mean thick."""
    return _curves(record)


@draws("natgrad-fig4")
def figure_4(record: Record) -> Drawing:
    """Against updates; those of MSGD are many more, so that the scale is logarithmic."""
    return _curves(record, xscale="log")


@draws("natgrad-fig5")
def figure_5(record: Record) -> Drawing:
    """Train and test error of each method."""
    return _curves(record)


@draws("natgrad-table1")
def table_1(record: Record) -> Drawing:
    """The test error of every method, ours against the printed one."""
    figure, axes = canvas(1, len(record.results), width=10, height=3.8)
    rows = []
    for one, (name, found) in zip(axes[0], record.results.items(), strict=True):
        ends, printed = found["methods"], PRINTED[name]
        ours = {method: _mean(ends[method]["test"]) for method in ends if method in printed}
        largest = max([value or 0.0 for value in ours.values()] + [error for _, error in printed.values()])
        for i, (method, error) in enumerate(ours.items()):
            colour, marker = STYLES[method]
            label = "printed" if i == 0 else None
            mark = {"markersize": 16, "markeredgewidth": 2.5, "color": INK["soft"], "label": label}
            one.plot(i - 0.15, printed[method][1], "_", **mark)
            if error is not None:
                one.plot(i + 0.15, error, marker, markersize=8, color=colour)
        one.set_xticks(range(len(ours)), [m.replace(", ", ",\n") for m in ours], fontsize=8, rotation=40)
        one.set(xlim=(-0.6, len(ours) - 0.4), ylim=(0, 1.1 * largest))
        one.set_title(TITLES[name], color=INK["ink"], fontsize=11)
        rows += [(f"{TITLES[name]}: {what}", printed, ours) for what, printed, ours in _rows(name, ends)]
    axes[0][0].set_ylabel("test error, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside upper right")
    return Drawing({"": figure}, rows)


def _curves(record: Record, xscale: str = "linear") -> Drawing:
    """Left the nll of all training cases, right the test error, against updates."""
    figure, axes = canvas(1, 2, width=10, height=4.2)
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for part, columns in record.results.items():
        runs.setdefault(method_of(part), []).append(columns)
    for name, found in runs.items():
        colour, marker = STYLES[name]
        line = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6, "label": name}
        for one, kind in zip(axes[0], ("train", "test"), strict=True):
            first = 0 if xscale == "linear" else 1  # on a logarithmic scale there is no update 0
            if len(found) > 1:
                for columns in found:
                    one.plot(columns["update"][first:], columns[kind][first:], color=colour, linewidth=0.6, alpha=0.5)
            longest: list[int] = max((columns["update"] for columns in found), key=len)
            # a run that diverged has fewer evaluations: there is no mean from there on
            values = [_mean(at) for at in zip_longest(*(columns[kind] for columns in found))]
            one.plot(longest[first:], values[first:], **line)
    for one, label in zip(axes[0], ("train: nll", "test: error, %"), strict=True):
        one.set(xscale=xscale, yscale="log", xlabel="updates")
        for axis in (one.xaxis, one.yaxis) if xscale == "log" else (one.yaxis,):
            axis.set_major_formatter("{x:g}")
            low, high = axis.get_view_interval()
            axis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.set_minor_formatter("{x:g}" if high < LABELLED * low else "")
        if xscale == "linear":
            one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.set_title(label, color=INK["ink"], fontsize=11, loc="left")
    axes[0][0].legend(fontsize=9, frameon=False)
    ends = {n: {kind: [r[kind][-1] for r in found] for kind in ("train", "test")} for n, found in runs.items()}
    return Drawing({"": figure}, _rows(record.name, ends))


def _rows(name: str, ends: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[tuple[str, str, str]]:
    rows = []
    for method, values in ends.items():
        train, test = PRINTED[name].get(method, (None, None))
        for kind, printed, form, unit in (("train nll", train, ".2g", ""), ("test error", test, ".2f", " %")):
            paper = "–" if printed is None else format(printed, form) + unit
            rows.append((f"{method}: {kind}", paper, _number(values[kind.split()[0]], form, unit)))
    return rows


def _number(values: Sequence[float | None], form: str, unit: str = "") -> str:
    """The mean, and of several runs the least and the largest."""
    mean = _mean(values)
    if mean is None:
        return "diverged"
    found = [format(value, form) for value in values if value is not None]
    least, largest = min(found, key=float), max(found, key=float)
    return format(mean, form) + unit + (f" ({least} to {largest})" if len(found) > 1 else "")


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a run diverged."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if len(found) == len(values) else None
