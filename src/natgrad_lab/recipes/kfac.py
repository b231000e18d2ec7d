"""Figures of Martens & Grosse (2015) [KFAC]."""

from typing import Any

from natgrad_lab.recipes.base import Size, recipe
from natgrad_lab.recipes.kfac_network import network
from natgrad_lab.recipes.run import Run

# Figure 2's network. What the paper leaves open was chosen so that the two errors that it prints come out about: 5 %
# after 7 iterations, 0 % after 22.
NETWORK = {
    "data": "mnist",
    "side": 16,
    "cases": 2000,
    "hidden": [20, 20, 20, 20, 20],  # printed: four of these, which has no "middle 4 layers"
    "shown": [1, 2, 3, 4],  # the middle 4 of 6 weight layers
    "lambda": 1e-3,
    "l2": 1e-5,
    "inverses": 1,  # T₃: in batch mode on a small network every iteration has fresh inverses
    "iterations": 7,
    "watched": 40,
}
DIGITS = {"data": "digits", "side": 8, "cases": 400, "hidden": [8, 8, 8, 8, 8], "watched": 12}


@recipe(
    "kfac-fig2",
    title="exact Fisher F, F̃ and their difference",
    source="[KFAC, fig. 2]",
    full=Size(60, NETWORK),
    quick=Size(3, DIGITS),
)
def figure_2(run: Run) -> None:
    """F and F̃ of the middle layers, exactly in the targets, over all cases."""
    net = network(run)

    def matrices() -> dict[str, Any]:
        exact, factored = net.fisher(), net.factored().to_dense(order="vec")
        run.save("matrices", {"F": exact.float(), "F̃": factored.float()})
        return {
            "size": len(exact),
            "edges": net.edges(),
            "total error": (exact - factored).abs().sum().item(),
            "total": exact.abs().sum().item(),
            "Frobenius error": (exact - factored).norm().item() / exact.norm().item(),
        }

    run.part("matrices", matrices)
