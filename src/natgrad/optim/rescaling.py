"""A coefficient for each layer's part of Δ, from the exact F: the rescaling of [KFAC, sec. 6.4], layer by layer.

The blocks of F̆ are wrong by factors that differ from layer to layer; one α for the whole update has to suit the layer
whose curvature is underestimated most. Every layer's tangent on the curvature rows tells M on the span of the parts
``Δ_l`` of Δ, and with it how much of each part to take. That costs a Jacobian-vector product for each layer, so it is
done where the inverses are renewed, and the coefficients are kept with them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.optim.evaluation import Evaluation
from natgrad.optim.layout import JointLayout
from natgrad.optim.local_model import LocalModel
from natgrad.optim.settings import Rescaling
from natgrad.quadratic import part_coefficients


class LayerCoefficients:
    """The coefficients c of ``Σ_l c_l Δ_l``, as they were found last.

    Args:
        layout: where the layers' parts lie.
        rescaling: how they are found; without ``layers`` all are 1.
        like: gives dtype and device.

    Attributes:
        due: whether the next :meth:`renew` finds them anew; set with every new inverse.
        values: ``[layers]``, one more where the model has parameters that no block holds.
    """

    def __init__(self, layout: JointLayout, rescaling: Rescaling, like: Tensor) -> None:
        self.layout, self.rescaling = layout, rescaling
        self.due = False
        self.active = bool(rescaling.layers) and len(layout.segments) > 1
        self.values: Float[Tensor, " parts"] = like.new_ones(len(layout.segments))

    def renew(
        self,
        local: LocalModel,
        evaluation: Evaluation,
        proposal: Float[Tensor, " size"],
        damping: Float[Tensor, ""],
        usable: Bool[Tensor, ""],
    ) -> None:
        """Find them anew, where they are due.

        Args:
            local: M.
            evaluation: of a batch.
            proposal: Δ for its gradient, every coefficient 1.
            damping: λ + η.
            usable: False keeps what there is.
        """
        if not (self.active and self.due):
            return
        self.due = False
        model = local.parts(evaluation.tapes, evaluation.gradient, proposal, damping)
        found = part_coefficients(model, self.rescaling.ridge, self.rescaling.least)
        self.values = torch.where(usable & torch.isfinite(found).all(), found.to(self.values.dtype), self.values)

    def apply(self, proposal: Float[Tensor, " size"]) -> None:
        """Multiply each part of Δ by its coefficient, in place."""
        if self.active:
            for where, value in zip(self.layout.segments, self.values.to(proposal.dtype), strict=True):
                proposal[where].mul_(value)
