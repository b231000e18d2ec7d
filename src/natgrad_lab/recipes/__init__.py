"""Recipes: one function per figure or table of the source documents, and the settings of the racing optimisers.

A recipe computes and writes a record; it never draws. `natgrad_lab.figures` reads records and draws; it never computes
anything that takes time. To add one: decorate a function with `@recipe` in the paper's file here, a function of the
same recipe with `@draws` in the paper's file there, and, if the file is new, name the paper in `PAPERS`.
"""

from natgrad_lab.recipes.base import Recipe, Size, recipe
from natgrad_lab.recipes.run import Run

PAPERS = ("kfac", "thesis", "natgrad")

__all__ = ["PAPERS", "Recipe", "Run", "Size", "recipe"]
