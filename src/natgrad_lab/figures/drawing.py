"""From a record to pictures and a table: the list of drawing functions, the style they share, and the files written.

Each PNG carries the name and size of the record it was drawn from, so that a documentation page can be checked.
"""

import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin
from torch import Tensor

from natgrad_lab.plots import SPARE_COLOURS, SPARE_MARKERS, THEMES, style_axes
from natgrad_lab.recipes.run import Record
from natgrad_lab.records import replace_text, write_json

QUICK = "quick size: it shows that the recipe runs and is not comparable with the paper"
COLOURS, MARKERS, INK = SPARE_COLOURS, SPARE_MARKERS, THEMES["light"]
COLOURS_OF_PNG = 128
# The shade that is white is the value that so many entries of a matrix do not exceed.
WHITE_QUANTILE = 0.995


@dataclass
class Drawing:
    """What a record looks like.

    Attributes:
        figures: By the suffix of their file: "" for the only one, else a word as in NAME-word.png.
        rows: The comparison: (what, the paper's, ours), as text. "–" where the paper gives no number.
    """

    figures: dict[str, Figure]
    rows: list[tuple[str, str, str]] = field(default_factory=list)


_DRAWS: dict[str, Callable[[Record], Drawing]] = {}


def draws(name: str) -> Callable[[Callable[[Record], Drawing]], Callable[[Record], Drawing]]:
    """Decorator: the function draws the records of this recipe."""

    def register(function: Callable[[Record], Drawing]) -> Callable[[Record], Drawing]:
        _DRAWS[name] = function
        return function

    return register


def draw(record: Record) -> Drawing:
    """The pictures and the table of a finished record.

    Raises:
        ValueError: the run is not finished, or nothing draws it.
    """
    if not record.finished:
        raise ValueError(
            f"the run in {record.folder} is not finished; natgrad paper run {record.name}"
            f"{' --quick' if record.quick else ''} continues it"
        )
    importlib.import_module(f"natgrad_lab.figures.{record.name.partition('-')[0]}")
    if record.name not in _DRAWS:
        raise ValueError(f"nothing draws {record.name}")
    drawing = _DRAWS[record.name](record)
    if record.quick:
        for figure in drawing.figures.values():
            engine = figure.get_layout_engine()
            if engine is not None:  # room below for one line
                engine.set(rect=(0, 0.04, 1, 0.96))
            figure.text(0.995, 0.004, QUICK, ha="right", va="bottom", fontsize=7, color=COLOURS[1])
    return drawing


def write(record: Record, drawing: Drawing, folder: Path) -> list[Path]:
    """Write NAME.png (or NAME-suffix.png), NAME.table.md and NAME.json, a copy of the record without the tensors."""
    paths = []
    for suffix, figure in drawing.figures.items():
        path = folder / f"{record.name}{'-' + suffix if suffix else ''}.png"
        _write_png(figure, path, record)
        paths.append(path)
    if drawing.rows:
        cells = [[cell.replace("|", r"\|") for cell in row] for row in drawing.rows]
        lines = ["| | paper | here |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in cells)]
        paths.append(folder / f"{record.name}.table.md")
        replace_text(paths[-1], "\n".join(lines) + "\n")
    content = {**record.content, "environment": {**record.content["environment"], "command": None}}
    paths.append(folder / f"{record.name}.json")
    write_json(paths[-1], content)
    return paths


def _write_png(figure: Figure, path: Path, record: Record) -> None:
    """Small: 128 colours are enough for lines and for shades of one colour."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    image = (
        Image.open(buffer)
        .convert("RGB")
        .quantize(COLOURS_OF_PNG, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    about = PngImagePlugin.PngInfo()
    about.add_text("natgrad-record", record.name)
    about.add_text("natgrad-size", "quick" if record.quick else "full")
    about.add_text("natgrad-started", record.content["started"])
    temporary = path.with_suffix(".tmp")
    image.save(temporary, format="png", optimize=True, pnginfo=about)
    temporary.replace(path)


def canvas(rows: int, columns: int, *, width: float = 8.0, height: float = 4.8, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes [rows][columns], styled; `options` go to `Figure.subplots`."""
    figure = Figure(figsize=(width, height), dpi=130, facecolor=INK["ground"], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        style_axes(one, INK)
    return figure, axes


def shade(axes: Axes, matrix: Any, title: str, *, largest: float, edges: Sequence[int] = (), pixels: int = 300) -> Any:
    """Absolute values as shades, 0 black, `largest` and above white; dashed lines at the `edges` of blocks.

    Large matrices are reduced to at most `pixels` rows by the mean of absolute values.
    """
    values = abs(matrix)
    step = -(-len(values) // pixels)
    if step > 1:
        n = len(values)
        padded = -(-n // step) * step
        sums = values.new_zeros(padded, padded)
        sums[:n, :n] = values
        values = sums.reshape(padded // step, step, -1, step).mean((1, 3))
    axes.grid(False)
    image = axes.imshow(
        values.numpy(),
        cmap="gray",
        vmin=0,
        vmax=largest,
        interpolation="nearest",
        extent=(0, len(matrix), len(matrix), 0),
    )
    for edge in edges:
        axes.axhline(edge, color=COLOURS[4], linewidth=0.6, linestyle=(0, (4, 3)))
        axes.axvline(edge, color=COLOURS[4], linewidth=0.6, linestyle=(0, (4, 3)))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, color=INK["ink"], fontsize=11)
    return image


def white_level(matrix: Tensor, quantile: float = WHITE_QUANTILE) -> float:
    """The value that is shown white."""
    values = matrix.abs().flatten()
    return values.kthvalue(max(1, int(quantile * len(values)))).values.item()
