"""The proposal ``Δ = −F̆_γ^{-1} ∇h`` from the averaged factors [KFAC, sec. 4.2, 6.3, 8]."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.inverse import BlockInverse, Eigenbasis, ExactInverse, FactoredInverse, eigenbasis, invert_block
from natgrad.curvature.running import RunningFactors, mean_eigenvalue
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.optim.evaluation import Evaluation
from natgrad.optim.layout import JointLayout
from natgrad.optim.low_rank import low_rank_apply, low_rank_pays


@dataclass
class Proposals:
    """Turns gradients into proposals; keeps the inverses between two refreshes.

    Where a decomposition fails the layer keeps its last good one, and ``failures`` counts it.

    Args:
        layout: of the flat vectors.
        running: the averaged factors.
        form: how damping enters.
        l2: η, for the part of the gradient that has full rank.
    """

    layout: JointLayout
    running: RunningFactors
    form: ExactTikhonov | FactoredTikhonov
    l2: float = 0.0
    failures: int = 0
    scale: Float[Tensor, ""] | float = 1.0  # the mean eigenvalue of F̆
    bases: dict[str, Eigenbasis] = field(default_factory=dict)
    blocks: dict[str, BlockInverse] = field(default_factory=dict)

    def refresh(self, damping: Float[Tensor, ""]) -> None:
        """New decompositions from the averaged factors."""
        self.scale = mean_eigenvalue(self.running.factors)
        if isinstance(self.form, FactoredTikhonov):
            self.blocks = self._factored(damping)
            return
        for name, factors in self.running.factors.items():
            basis = eigenbasis(factors)
            self.failures += int(not basis.ok)
            if bool(basis.ok) or name not in self.bases:
                self.bases[name] = basis

    def inverse(self, damping: Float[Tensor, ""], *, fresh: bool = False) -> dict[str, BlockInverse]:
        """Every block's inverse. In the eigenbasis a new damping is free; factored inverses are those of the last refresh, or fresh."""
        if isinstance(self.form, ExactTikhonov):
            return {name: ExactInverse(basis, damping) for name, basis in self.bases.items()}
        return self._factored(damping) if fresh else self.blocks

    def wants_rows(self, rows: int) -> bool:
        """Whether any layer's proposal is cheaper from the rows of the batch than from its gradient [KFAC, sec. 8]."""
        shapes = [shape for _, shape in self.layout.block_slices.values()]
        return isinstance(self.form, FactoredTikhonov) and any(low_rank_pays(rows, *shape) for shape in shapes)

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
        inverse = self.inverse(damping, fresh=fresh)
        proposal = self.layout.blocks(into)
        for name, gradient in self.layout.blocks(evaluation.gradient).items():
            block, rows = inverse[name], evaluation.rows.get(name)
            if (
                rows
                and isinstance(block, FactoredInverse)
                and low_rank_pays(sum(len(a) for a, _ in rows), *gradient.shape)
            ):
                product = low_rank_apply(block, rows, evaluation.count)
                if self.l2:
                    product.add_(block.apply(self.layout.joint(name)), alpha=self.l2)
            else:
                product = block.apply(gradient)
            torch.neg(product, out=proposal[name])
        gradients = self.layout.others(evaluation.gradient)
        for name, part in self.layout.others(into).items():
            torch.div(gradients[name], -(1 + damping).to(part.dtype), out=part)  # F is taken as the identity there

    def _factored(self, damping: Float[Tensor, ""]) -> dict[str, BlockInverse]:
        blocks = dict(self.blocks)
        for name, factors in self.running.factors.items():
            block = invert_block(factors, damping, self.form)
            self.failures += int(not block.ok)
            if bool(block.ok) or name not in blocks:
                blocks[name] = block
        return blocks
