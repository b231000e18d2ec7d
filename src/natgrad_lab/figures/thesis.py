"""Figures and tables of George (2017) [THESIS], from records."""

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import LogLocator, NullFormatter

from natgrad_lab.figures import thesis_methods
from natgrad_lab.figures.drawing import INK, Drawing, canvas, draws
from natgrad_lab.recipes.run import Record
from natgrad_lab.recipes.thesis import METHODS

__all__ = ["thesis_methods"]  # figures 6.1 and 6.2, section 4.3

TITLES = {"grid": "grid search", "random": "random search", "biased": "biased random search"}
PRINTED = {"grid": "27.23 ± 0.42", "random": "27.02 ± 0.28", "biased": "26.61 ± 0.13"}


@draws("thesis-fig2.2")
def figure_2_2(record: Record) -> Drawing:
    """Shades of the cost; what diverged is left white."""
    found, result = record.tensors("costs"), record.results["costs"]
    figure, axes = canvas(1, 1, width=6.4, height=4.8)
    one = axes[0][0]
    one.grid(False)
    costs = found["costs"].numpy()
    image = one.pcolormesh(_edges(found["lr"]), _edges(found["alpha"]), costs.T, cmap="viridis")
    _logarithmic(one)
    figure.colorbar(image, ax=one, label=f"cost after {record.configuration['iterations']} iterations")
    rows = [("least cost", "–", f"{result['best']:.2f}"), ("share that diverged", "–", f"{np.isnan(costs).mean():.2f}")]
    row, column = np.unravel_index(np.nanargmin(costs), costs.shape)
    best = f"{found['lr'][row].item():.2g}, {found['alpha'][column].item():.2g}"
    return Drawing({"": figure}, [*rows, ("there: learning rate, α", "–", best)])


@draws("thesis-fig4.1")
def figure_4_1(record: Record) -> Drawing:
    """Where each search looked, coloured by cost, best blue and worst yellow; crosses diverged."""
    figure, axes = canvas(1, 3, width=11.0, height=3.9, sharey=True)
    known = [t["cost"] for m in METHODS for t in record.results[m]["trials"] if t["cost"] is not None]
    scale, rows, image = Normalize(min(known), max(known)), [], None
    for one, method in zip(axes[0], METHODS, strict=True):
        trials = record.results[method]["trials"]
        good = [t for t in trials if t["cost"] is not None]
        bad = [t for t in trials if t["cost"] is None]
        one.plot([t["lr"] for t in bad], [t["alpha"] for t in bad], "x", color=INK["soft"], markersize=5)
        image = one.scatter(
            *([t[k] for t in good] for k in ("lr", "alpha")),
            c=[t["cost"] for t in good],
            cmap="viridis",
            norm=scale,
            s=42,
            edgecolors=INK["ink"],
            linewidths=0.4,
        )
        _logarithmic(one, "α of the initial weights" if method == METHODS[0] else "")
        one.set_xlim(*record.configuration["lr"])
        one.set_ylim(*record.configuration["alpha"])
        one.set_title(f"{TITLES[method]}: best {record.results[method]['best']:.2f}", fontsize=11, color=INK["ink"])
        rows.append((f"{TITLES[method]}: best of {len(trials)}", "–", f"{record.results[method]['best']:.2f}"))
        middle = float(np.median([t["cost"] if t["cost"] is not None else math.inf for t in trials]))
        rows.append((f"{TITLES[method]}: median cost", "–", f"{middle:.2f}"))
        rows.append((f"{TITLES[method]}: diverged", "–", str(len(bad))))
    figure.colorbar(image, ax=list(axes[0]), label="final cost")
    return Drawing({"": figure}, rows)


@draws("thesis-table4.1")
def table_4_1(record: Record) -> Drawing:
    """The best costs of all searches by kind: every search a point, with mean and deviation."""
    best = {method: _collected(record, method, "best") for method in METHODS}
    figure, axes = canvas(1, 1, width=6.4, height=3.6)
    one: Any = axes[0][0]
    rows = []
    for i, method in enumerate(METHODS):
        values = torch.tensor(best[method], dtype=torch.float64)
        spread = (torch.arange(len(values)) * 0.6180339887 % 1.0 - 0.5) * 0.5  # evenly, without chance
        one.plot(i + spread, values, "o", markersize=3.5, color=INK["soft"], alpha=0.7)
        mean, deviation = values.mean().item(), values.std().item()
        one.errorbar(i, mean, yerr=deviation, fmt="s", markersize=8, capsize=7, color=INK["ink"], linewidth=2)
        rows.append((TITLES[method], PRINTED[method], f"{mean:.3f} ± {deviation:.3f}"))
    rows += [
        (f"biased below {m}, in standard errors", "–", f"{_errors(best[m], best['biased']):.1f}")
        for m in ("grid", "random")
    ]
    trials = record.configuration["trials"] * len(best["biased"])
    for method in METHODS:
        failed = sum(_collected(record, method, "failed"))
        rows.append((f"{TITLES[method]}: share that diverged", "–", f"{failed / trials:.2f}"))
    one.set_xticks(range(len(METHODS)), [TITLES[m] for m in METHODS])
    one.set_ylabel("best cost of a search", color=INK["ink"], fontsize=11)
    return Drawing({"": figure}, rows)


def _edges(middles: torch.Tensor) -> Any:
    """Where the cells around places that are evenly spaced in the logarithm begin and end."""
    half = (middles[1] / middles[0]).sqrt()
    return torch.cat([middles / half, middles[-1:] * half]).numpy()


def _collected(record: Record, method: str, key: str) -> list[float]:
    """A list of all blocks of searches by one method."""
    return [value for name, part in record.results.items() if name.startswith(f"{method},") for value in part[key]]


def _errors(a: list[float], b: list[float]) -> float:
    """How many standard errors of the difference the mean of a is above that of b."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    return ((x.mean() - y.mean()) / (x.var() / len(x) + y.var() / len(y)).sqrt()).item()


def _logarithmic(axes: Axes, vertical: str = "α of the initial weights") -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate", color=INK["ink"], fontsize=11)
    axes.set_ylabel(vertical, color=INK["ink"], fontsize=11)
