"""Figures of Pascanu & Bengio (2013) [NATGRAD], from records."""

from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from natgrad_lab.figures import natgrad_comparison, natgrad_order
from natgrad_lab.figures.drawing import INK, Drawing, draws
from natgrad_lab.plots import style_axes
from natgrad_lab.recipes.run import Record

__all__ = ["natgrad_comparison", "natgrad_order"]  # figures 2, 4 and 5 and table 1; figure 3

# The paper's: blue, gray, orange, purple.
METHODS = {"gradient descent": "#7B3294", "natural gradient": "#6a737d", "covariance": "#E69F00", "Newton": "#0072B2"}


@draws("natgrad-fig1")
def figure_1(record: Record) -> Drawing:
    """Left the paths on the error surface, right the KL surfaces at four places with the proposed steps."""
    c, surfaces = record.configuration, record.tensors("surfaces")
    figure = Figure(figsize=(11, 6.6), dpi=110, facecolor=INK["ground"], layout="constrained")
    FigureCanvasAgg(figure)
    layout = figure.add_gridspec(2, 4)
    large = figure.add_subplot(layout[:, :2])
    small = [figure.add_subplot(layout[i // 2, 2 + i % 2]) for i in range(4)]
    for axes in (large, *small):
        style_axes(axes, INK)
        axes.grid(False)
    (w0, w1), (b0, b1) = c["window"]
    w, b = torch.linspace(w0, w1, c["grid"]), torch.linspace(b0, b1, c["grid"])
    large.contour(b, w, surfaces["error"].log(), levels=30, linewidths=0.6, cmap="Greys_r", alpha=0.6)
    paths = [found for name, found in record.results.items() if name.startswith("paths")]
    for found in paths:
        for method, colour in METHODS.items():
            path = torch.tensor(found[method])
            label = method if found is paths[0] else None
            large.plot(path[:, 1], path[:, 0], "-o", markersize=2.5, linewidth=1.2, color=colour, label=label)
    large.set(xlim=(b0, b1), ylim=(w0, w1), xlabel="b", ylabel="w")
    large.set_title(f"error, {c['steps']} steps of four methods", color=INK["ink"], fontsize=11)
    large.legend(loc="lower left", fontsize=9, frameon=False)
    places = record.results["places"]
    half = c["kl window"]
    axis = torch.linspace(-half, half, c["grid"])
    for i, (axes, place, steps) in enumerate(zip(small, places["places"], places["steps"], strict=True)):
        large.annotate(f"[{i + 1}]", (place[1], place[0]), xytext=(6, 8), textcoords="offset points", fontsize=11)
        axes.contour(axis, axis, surfaces[f"KL {i}"].add(1e-4).log(), levels=20, linewidths=0.6, cmap="Greys_r")
        for method, colour in METHODS.items():
            dw, db = steps[method]
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (db, dw), (0, 0), arrowprops=arrow, annotation_clip=False)
        axes.set(xlim=(-half, half), ylim=(-half, half), xlabel="Δb", ylabel="Δw")
        axes.set_title(f"KL at [{i + 1}]", color=INK["ink"], fontsize=11)
    return Drawing({"": figure}, _rows(paths, places["steps"]))


def _rows(paths: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The two observations of sec. 4 as numbers."""

    def length(place: int, method: str) -> float:
        return torch.tensor(steps[place][method]).norm().item()

    def angle(place: int) -> float:
        natural, plain = (torch.tensor(steps[place][m]) for m in ("natural gradient", "gradient descent"))
        return torch.rad2deg(torch.arccos(torch.cosine_similarity(natural, plain, dim=0))).item()

    plain = length(2, "gradient descent")
    rows = [
        ("step at [3] / gradient descent's: natural", "below 1", f"{length(2, 'natural gradient') / plain:.2f}"),
        ("step at [3] / gradient descent's: Newton", "above 1", f"{length(2, 'Newton') / plain:.2f}"),
        ("natural against plain direction at [3]", "different", f"{angle(2):.0f}°"),
        ("natural against plain direction at [4]", "different", f"{angle(3):.0f}°"),
    ]
    for i, found in enumerate(paths):
        for method in METHODS:
            w, b = found[method][-1]
            rows.append(
                (f"from [{2 * i + 1}], {method}: w, b, error", "–", f"{w:.2f}, {b:.2f}, {found['errors'][method]:.3f}")
            )
    return rows
