"""Pictures of an inspected network: spectra of the factors, and the Fisher matrix of a few neighbouring layers."""

from pathlib import Path

from matplotlib.figure import Figure

from natgrad_lab.figures.drawing import COLOURS, INK, canvas, shade, white_level
from natgrad_lab.inspection import Inspection


def spectra(found: Inspection) -> Figure:
    """Eigenvalues of A and of G for each layer, as shares of the largest."""
    figure, axes = canvas(1, 2, width=9.5, height=4.4)
    for one, which, title in zip(
        axes[0], ("eigenvalues_a", "eigenvalues_g"), ("A, inputs", "G, output derivatives"), strict=True
    ):
        for i, layer in enumerate(found.layers):
            values = [v for v in getattr(layer, which) if v > 0]
            colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
            shares = [v / values[0] for v in values]
            one.plot(range(1, len(values) + 1), shares, style, color=colour, linewidth=1.6, label=layer.name)
        one.set(xscale="log", yscale="log", xlabel="eigenvalue number", ylim=(1e-12, 2))
        one.set_title(f"spectrum of {title}", color=INK["ink"], fontsize=11, loc="left")
    axes[0][0].set_ylabel("share of the largest")
    axes[0][1].legend(title="layer", fontsize=8, frameon=False, ncols=2)
    return figure


def window(found: Inspection) -> Figure | None:
    """F, F̃, the difference and the damped inverse of F̃ for the layers whose matrix is small enough."""
    if not found.matrices:
        return None
    sizes = found.window["sizes"]
    edges = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    F, factored, inverse = (found.matrices[name] for name in ("F", "F̃", "inverse"))
    figure, axes = canvas(1, 4, width=13, height=3.8)
    largest = white_level(F)
    pictures = ((F, "F", largest), (factored, "F̃", largest), (F - factored, "|F − F̃|", largest))
    for one, (matrix, title, level) in zip(
        axes[0], (*pictures, (inverse, "F̃⁻¹, damped", white_level(inverse, 0.98))), strict=True
    ):
        shade(one, matrix, f"{title} (white: {level:.2g})", largest=level, edges=edges)
    names = ", ".join(found.window["layers"])
    figure.suptitle(f"layers {names}: {sum(sizes)} parameters", color=INK["soft"], fontsize=9)
    return figure


def write(found: Inspection, folder: Path) -> list[Path]:
    """Write `spectra.png` and, where there is one, `fisher.png`."""
    paths = []
    for name, figure in (("spectra", spectra(found)), ("fisher", window(found))):
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths
