"""What a recipe is, and the list of all of them."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from natgrad_lab.optimizers import unknown

if TYPE_CHECKING:
    from natgrad_lab.recipes.run import Run


@dataclass(frozen=True)
class Size:
    """One size of a recipe.

    Attributes:
        seconds: What it takes on two cores, about.
        configuration: All that was chosen, as plain values; a quick size names only what differs from the full one.
    """

    seconds: float
    configuration: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A figure or table of a source document.

    Attributes:
        name: As on the command line: paper and number, as in "kfac-fig2", "thesis-fig2.2", "natgrad-table1".
        title: What is seen, in at most 44 characters.
        source: Where it is printed, as docstrings cite it: "[KFAC, fig. 2]".
        full, quick: The size that is compared with the paper, and the one that shows in seconds that everything works.
        compute: Writes the record.
    """

    name: str
    title: str
    source: str
    full: Size
    quick: Size
    compute: Callable[["Run"], None] = field(repr=False)

    @property
    def paper(self) -> str:
        """The file that it is in."""
        return self.name.partition("-")[0]

    def configuration(self, quick: bool) -> dict[str, Any]:
        """Everything that was chosen for one of the sizes."""
        return {**self.full.configuration, **(self.quick.configuration if quick else {})}


_RECIPES: dict[str, Recipe] = {}

# Figures that another one's recipe draws: the same runs, against another axis.
ALSO = {"kfac-fig11" + task: "kfac-fig10" + task for task in ("", "-mnist", "-faces")}


def recipe(
    name: str, *, title: str, source: str, full: Size, quick: Size
) -> Callable[[Callable[["Run"], None]], Recipe]:
    """Decorator: the function that computes a figure becomes a `Recipe`.

    The function takes a `Run` and reads everything that could be chosen otherwise from `run.configuration`.
    """

    def register(compute: Callable[["Run"], None]) -> Recipe:
        stray = set(quick.configuration) - set(full.configuration)
        if stray:
            raise ValueError(f"recipe {name!r}: the quick size sets {sorted(stray)}, which the full size does not have")
        if len(title) > 44:
            raise ValueError(f"recipe {name!r}: the title has {len(title)} characters; 44 fit the table of 80 columns")
        made = Recipe(name, title, source, full, quick, compute)
        _RECIPES[name] = made
        return made

    return register


def all_recipes() -> dict[str, Recipe]:
    """Every recipe by name, in the order of papers and numbers."""
    from natgrad_lab.recipes import PAPERS

    for paper in PAPERS:
        importlib.import_module(f"natgrad_lab.recipes.{paper}")
    order = {paper: i for i, paper in enumerate(PAPERS)}
    return dict(sorted(_RECIPES.items(), key=lambda item: (order.get(item[1].paper, len(order)), _natural(item[0]))))


def find(name: str) -> Recipe:
    """The recipe of this name, or the one that draws the figure of this name too.

    Raises:
        ValueError: with the nearest known name and the whole list.
    """
    known = all_recipes()
    name = ALSO.get(name, name)
    if name not in known:
        raise ValueError(unknown("recipe", name, known))
    return known[name]


def _natural(name: str) -> tuple[str, list[float]]:
    """fig9 before fig10: the words, then the numbers."""
    words = "".join(c for c in name if not (c.isdigit() or c == "."))
    numbers = "".join(c if c.isdigit() else " " for c in name).split()
    return words, [float(n) for n in numbers]
