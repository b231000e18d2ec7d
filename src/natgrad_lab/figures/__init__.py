"""Figures of the source documents, drawn from finished records: nothing here trains anything."""

from natgrad_lab.figures.drawing import Drawing, draws

__all__ = ["Drawing", "draws"]
