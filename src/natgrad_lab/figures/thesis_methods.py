"""Figures of [THESIS, sec. 6.6] and of the classifier of sec. 4.3, from records."""

from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from natgrad_lab.figures.drawing import COLOURS, INK, MARKERS, Drawing, canvas, draws
from natgrad_lab.recipes.run import Record

LABELS = {"lr": "lr", "init": "α₀", "damping": "λ", "alpha": "α"}


@draws("thesis-fig6.1")
def figure_6_1(record: Record) -> Drawing:
    """Train and test loss against time."""
    return _compared(record)


@draws("thesis-fig6.2")
def figure_6_2(record: Record) -> Drawing:
    """Train and test loss against time."""
    return _compared(record)


@draws("thesis-sec4.3")
def section_4_3(record: Record) -> Drawing:
    """Train and test loss against time."""
    return _compared(record)


def best(record: Record, method: str) -> dict[str, Any] | None:
    """The run of a method that is shown: the longer one with the least training loss at its end; None: all diverged."""
    runs = [part for name, part in record.results.items() if name.startswith(f"{method}, best ")]
    whole = [part for part in runs if part["end"] == "finished"]
    return min(whole, key=lambda part: part["train"][-1]) if whole else None


def _compared(record: Record) -> Drawing:
    figure, axes = canvas(1, 2, width=10.5, height=4.4, sharey=True)
    rows = []
    for i, method in enumerate(record.configuration["methods"]):
        found = best(record, method)
        trials = [part for name, part in record.results.items() if name.startswith(f"{method}, trial ")]
        diverged = sum(part["end"] == "diverged" for part in trials)
        if found is None:
            rows.append((method, "–", f"diverged ({diverged} of {len(trials)} trials did)"))
            continue
        for one, column in zip(axes[0], ("train", "test"), strict=True):
            one.plot(
                found["seconds"][1:],
                found[column][1:],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4.5,
                markevery=max(1, len(found["seconds"]) // 8),
                linewidth=1.8,
                label=method,
            )
        rows += _rows(record, method, found, diverged, len(trials))
    for one, title in zip(axes[0], ("training set", "test set"), strict=True):
        one.set_yscale("log")
        one.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0)))
        one.yaxis.set_minor_locator(NullLocator())
        one.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_xlabel("seconds of updates", color=INK["ink"], fontsize=11)
        one.set_title(title, color=INK["ink"], fontsize=11, loc="left")
    loss = "cross-entropy" if record.configuration["classify"] else "E ‖f(x) − x‖²"
    axes[0][0].set_ylabel(loss, color=INK["ink"], fontsize=11)
    axes[0][0].legend(fontsize=9, frameon=False)
    return Drawing({"": figure}, rows)


def _rows(record: Record, method: str, found: dict[str, Any], diverged: int, trials: int) -> list[tuple[str, str, str]]:
    least = min(found["test"])
    when = found["seconds"][found["test"].index(least)]
    test = f"test {found['test'][-1]:.3g}, at best {least:.3g} after {when:.3g} s"
    if record.configuration["classify"]:
        test += f", {100 * found['test_wrong'][-1]:.1f} % wrong"
    settings = ", ".join(f"{LABELS[key]} {value:.2g}" for key, value in found["settings"].items())
    return [
        (f"{method}: loss at the end", "–", f"train {found['train'][-1]:.3g}, {test}"),
        (f"{method}: updates", "–", str(found["update"][-1])),
        (f"{method}: settings found", "–", f"{settings} ({diverged} of {trials} trials diverged)"),
    ]
