"""Figures of Martens & Grosse (2015) [KFAC], from records."""

from typing import Any

import torch

from natgrad_lab.figures import kfac_experiments
from natgrad_lab.figures.drawing import INK, WHITE_QUANTILE, Drawing, canvas, draws, shade, white_level
from natgrad_lab.recipes.run import Record

# Inverses have a strong diagonal: a lower level of white shows the rest.
WHITE_QUANTILE_INVERSE = 0.98

__all__ = ["kfac_experiments"]  # figures 7, 9, 10 and 11


@draws("kfac-fig2")
def figure_2(record: Record) -> Drawing:
    """F, F̃ and the absolute difference, side by side."""
    found, result = record.tensors("matrices"), record.results["matrices"]
    exact, factored = found["F"], found["F̃"]
    figure, axes = canvas(1, 3, width=10.5, height=3.9)
    largest = white_level(exact)
    for one, (matrix, title) in zip(
        axes[0], ((exact, "F"), (factored, "F̃"), (exact - factored, "|F − F̃|")), strict=True
    ):
        shade(one, matrix, title, largest=largest, edges=edges(result))
    figure.suptitle(f"white: {largest:.2g} and above; {result['size']} parameters", color=INK["soft"], fontsize=9)
    return Drawing({"": figure}, [*training_rows(record), *_error_rows(result)])


@draws("kfac-fig3")
def figure_3(record: Record) -> Drawing:
    """F̃, its inverse, and the means of the inverse's blocks."""
    found, result = record.tensors("matrices"), record.results["matrices"]
    figure, axes = canvas(1, 3, width=10.5, height=4.2)
    pictures = ((found["F̃"], "F̃", WHITE_QUANTILE), (found["inverse"], "F̃⁻¹, damped", WHITE_QUANTILE_INVERSE))
    for one, (matrix, title, quantile) in zip(axes[0], pictures, strict=False):
        largest = white_level(matrix, quantile)
        shade(one, matrix, f"{title} (white: {largest:.2g})", largest=largest, edges=edges(result))
    means = torch.tensor(result["means"])
    shade(axes[0][2], means, "mean |F̃⁻¹| of each block", largest=means.max().item())
    for i, row in enumerate(result["means"]):
        for j, mean in enumerate(row):
            colour = INK["ink"] if mean > 0.5 * means.max() else INK["ground"]
            axes[0][2].text(j + 0.5, i + 0.5, f"{mean:.2g}", ha="center", va="center", fontsize=9, color=colour)
    rows = block_rows(result["means"], "F̃⁻¹,")
    if "whole" in record.results:
        rows += block_rows(record.results["whole"]["means"], "all six layers,")
    return Drawing({"": figure}, [*training_rows(record), *rows])


@draws("kfac-fig5")
def figure_5(record: Record) -> Drawing:
    """F̃, an approximation, and the absolute difference; a row for each approximation."""
    return _comparison(record, "")


@draws("kfac-fig6")
def figure_6(record: Record) -> Drawing:
    """The same for the inverses."""
    return _comparison(record, "⁻¹")


def _comparison(record: Record, power: str) -> Drawing:
    found, result = record.tensors("matrices"), record.results["matrices"]
    names = list(record.configuration["structures"])
    figure, axes = canvas(len(names), 3, width=10.5, height=0.4 + 3.5 * len(names))
    target = found["F̃"]
    largest = white_level(target, WHITE_QUANTILE_INVERSE if power else WHITE_QUANTILE)
    rows = training_rows(record)
    for row, name in zip(axes, names, strict=True):
        pictures = ((target, f"F̃{power}"), (found[name], f"{name}{power}"), (target - found[name], "difference"))
        for one, (matrix, title) in zip(row, pictures, strict=True):
            shade(one, matrix, title, largest=largest, edges=edges(result))
        errors = result["errors"][name]
        rows.append((f"‖F̃{power} − {name}{power}‖ / ‖F̃{power}‖", "–", f"{errors['Frobenius error']:.3f}"))
        means = torch.tensor(errors["means"])
        size = torch.tensor(result["means"]).diagonal().mean()
        for what, mean in (
            ("diagonal", means.diagonal().mean()),
            ("adjacent", means.diagonal(1).mean()),
            ("other", torch.cat([means.diagonal(k) for k in range(2, len(means))]).mean()),
        ):
            rows.append((f"F̃{power} − {name}{power}, {what} blocks", "–", f"{(mean / size).item():.2g}"))
    figure.suptitle(f"white: {largest:.2g} and above", color=INK["soft"], fontsize=9)
    return Drawing({"": figure}, rows)


def block_rows(means: list[list[float]], which: str) -> list[tuple[str, str, str]]:
    """The size of blocks beside the diagonal and farther away, as shares of the diagonal blocks' size."""
    diagonals = [torch.tensor(means).diagonal(k).mean() for k in range(len(means))]
    return [
        (f"{which} block at distance {k} from the diagonal", "–", f"{(mean / diagonals[0]).item():.3f}")
        for k, mean in enumerate(diagonals)
        if k
    ]


def edges(result: dict[str, Any]) -> list[int]:
    """Where one layer's parameters end and the next one's begin."""
    return torch.tensor(result["sizes"]).cumsum(0)[:-1].tolist()


def training_rows(record: Record) -> list[tuple[str, str, str]]:
    """The errors during training that the caption of figure 2 prints."""
    training, c = record.results["training"], record.configuration
    zero = training["iterations to error 0"]
    return [
        ("error after 7 iterations", "5 %", f"{training['error'][6]:.1f} %"),
        ("iterations to error 0 %", "22", f"more than {c['watched']}" if zero is None else str(zero)),
    ]


def _error_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        ("sum of |F − F̃| over all pairs", "2894.4", f"{result['total error']:.1f}"),
        ("its bound from higher cumulants, eq. 4", "4134.6", f"{result['bound']:.1f}"),
        ("bound / sum", "1.43", f"{result['bound'] / result['total error']:.2f}"),
        ("the sum as a share of the sum of |F|", "–", f"{result['total error'] / result['total']:.3f}"),
        ("‖F − F̃‖ / ‖F‖ (Frobenius)", "–", f"{result['Frobenius error']:.3f}"),
    ]
