"""Figures of Martens & Grosse (2015) [KFAC], from records."""

from natgrad_lab.figures.drawing import INK, Drawing, canvas, draws, shade
from natgrad_lab.recipes.run import Record

# The shade that is white is the value that so many of F's entries do not exceed; the same in all pictures of a figure.
WHITE_QUANTILE = 0.995


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
        shade(one, matrix, title, largest=largest, edges=result["edges"])
    figure.suptitle(f"white: {largest:.2g} and above; {result['size']} parameters", color=INK["soft"], fontsize=9)
    return Drawing({"": figure}, [*training_rows(record), *_error_rows(result)])


def white_level(matrix):
    """The value that is shown white."""
    values = matrix.abs().flatten()
    return values.kthvalue(max(1, int(WHITE_QUANTILE * len(values)))).values.item()


def training_rows(record: Record) -> list[tuple[str, str, str]]:
    """The errors during training that the caption of figure 2 prints."""
    training, c = record.results["training"], record.configuration
    zero = training["iterations to error 0"]
    return [
        ("error after 7 iterations", "5 %", f"{training['error'][6]:.1f} %"),
        ("iterations to error 0 %", "22", f"more than {c['watched']}" if zero is None else str(zero)),
    ]


def _error_rows(result) -> list[tuple[str, str, str]]:
    return [
        ("sum of |F − F̃| over all pairs", "2894.4", f"{result['total error']:.1f}"),
        ("the same as a share of the sum of |F|", "–", f"{result['total error'] / result['total']:.3f}"),
        ("‖F − F̃‖ / ‖F‖ (Frobenius)", "–", f"{result['Frobenius error']:.3f}"),
    ]
