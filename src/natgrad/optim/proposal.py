"""The proposal ``Δ = −F̆_γ^{-1} ∇h`` or ``−F̂_γ^{-1} ∇h`` from the averaged factors [KFAC, sec. 4.2, 4.3, 6.3, 8]."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, diagonal
from natgrad.curvature.block_inverse import FactoredInverse, WritesNegative
from natgrad.curvature.gram import Gram
from natgrad.curvature.running import RunningFactors, mean_eigenvalue
from natgrad.damping import ExactTikhonov
from natgrad.linalg.low_rank import LowRank
from natgrad.optim.evaluation import Evaluation
from natgrad.optim.inverses import LayerInverses
from natgrad.optim.layout import JointLayout
from natgrad.optim.low_rank import low_rank_apply, low_rank_pays


class Proposals:
    """Turns gradients into proposals; keeps the inverses between two refreshes.

    A layer whose decomposition fails keeps its last good inverse; as long as it has none its gradient is used as it is.

    Args:
        layout: of the flat vectors.
        running: the averaged factors.
        inverses: of the covered layers; they say how damping enters.
        l2: η, for the part of the gradient that has full rank.

    Attributes:
        scale: the mean eigenvalue of F̆ at the last refresh.
    """

    def __init__(self, layout: JointLayout, running: RunningFactors, inverses: LayerInverses, l2: float = 0.0) -> None:
        self.layout, self.running, self.inverses, self.l2 = layout, running, inverses, l2
        self.form = inverses.form
        self.scale: Float[Tensor, ""] | float = 1.0

    def observe(self, estimate: Mapping[str, Factors], usable: Bool[Tensor, ""]) -> None:
        """Take one estimate of the factors into the averages."""
        self.inverses.observe(estimate, self.running, usable)

    def refresh(self, damping: Float[Tensor, ""]) -> None:
        """New decompositions from the averaged factors."""
        self.scale = mean_eigenvalue(self.running.factors)
        self.inverses.refresh(self._factors(), damping)

    def _factors(self) -> dict[str, Factors]:
        """Those of the layers and of the pairs that are inverted together."""
        names = [*self.layout.block_slices, *self.inverses.pairs.values()]
        return {name: self.running.factors[name] for name in names}

    def wants_rows(self, rows: int) -> bool:
        """Whether any layer's proposal is cheaper from the rows of the batch than from its gradient [KFAC, sec. 8]."""
        if isinstance(self.form, ExactTikhonov):
            return False
        factors, solver = self.running.factors, self.form.solver
        return any(
            low_rank_pays(rows, *shape, **_dense(factors[name].G, factors[name].A) if name in factors else {})
            for name, (_, shape) in self.layout.block_slices.items()
            if len(shape) == 2 and not (isinstance(solver, LowRank) and any(map(solver.applies, shape)))
        )

    def write(
        self, evaluation: Evaluation, damping: Float[Tensor, ""], into: Float[Tensor, " size"], *, fresh: bool = False
    ) -> None:
        """Write Δ for the evaluation's gradient.

        Args:
            evaluation: of a batch; its gradient holds the l2 term.
            damping: γ², the coefficient of the identity.
            into: the flat buffer for Δ.
            fresh: invert with this damping even where that costs a decomposition.
        """
        inverses = self.inverses
        if fresh and not isinstance(self.form, ExactTikhonov):
            inverses = inverses.renewed(self._factors(), damping)
        gradients, proposal = self.layout.blocks(evaluation.gradient), self.layout.blocks(into)
        for name, gradient in gradients.items():
            block, rows = inverses.at(name, damping), evaluation.rows.get(name)
            if block is None:
                product = gradient
            elif (
                rows
                and isinstance(block, FactoredInverse)
                and low_rank_pays(sum(len(a) for a, _ in rows), *gradient.shape, **_dense(block.G, block.A))
            ):
                product = low_rank_apply(block, rows, evaluation.count)
                if self.l2:
                    product.add_(block.apply(self.layout.joint(name)), alpha=self.l2)
            elif isinstance(block, WritesNegative):
                block.write_negative(gradient, proposal[name])
                continue
            else:
                product = block.apply(gradient)
            torch.neg(product, out=proposal[name])
        inverses.couple(gradients, proposal)
        others = self.layout.others(evaluation.gradient)
        for name, part in self.layout.others(into).items():
            torch.div(others[name], -(self._diagonal(name, part) + damping).to(part.dtype), out=part)

    def _diagonal(self, name: str, part: Tensor) -> Tensor:
        """diag(F) of a parameter that no layer block holds; the identity unless it is estimated."""
        block = self.running.factors.get(name)
        if block is None:
            return part.new_ones(())
        return (diagonal(block.A) * diagonal(block.G)).view_as(part)


def _dense(G: Tensor | Diagonal | Gram, A: Tensor | Diagonal | Gram) -> dict[str, bool]:
    """Which factors, or inverses of factors, are full matrices."""
    return {
        "dense_out": len(G.shape) == 2 and isinstance(G, Tensor),
        "dense_in": len(A.shape) == 2 and isinstance(A, Tensor),
    }
