"""γ chosen by trying: the γ rule [KFAC, sec. 6.6]."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.optim.evaluation import Evaluation
from natgrad.optim.local_model import LocalModel
from natgrad.optim.proposal import Proposals
from natgrad.quadratic import best_coefficients, best_step


@dataclass
class Trials:
    """Judges candidates by the update that each would make.

    Args:
        local: M(δ) and h(θ + δ).
        proposals: Δ under a damping.
    """

    local: LocalModel
    proposals: Proposals

    def best_gamma(
        self,
        evaluation: Evaluation,
        candidates: tuple[Tensor, ...],
        quality: str,
        damping: Float[Tensor, ""],
        directions: list[Float[Tensor, " size"]],
    ) -> Float[Tensor, ""]:
        """The γ whose update is best by M(δ) − M(0) (``"model"``) or by h(θ + δ) (``"loss"``) [KFAC, sec. 6.6].

        Args:
            evaluation: of a batch.
            candidates: values of γ.
            quality: what is compared.
            damping: λ + η.
            directions: a buffer for Δ, and δ₀ where there is momentum.
        """
        values = []
        for gamma in candidates:
            self.proposals.write(evaluation, gamma**2, directions[0], fresh=True)
            model, _ = self.local.subspaces(evaluation.tapes, evaluation.gradient, directions, damping)
            coefficients = best_coefficients(model) if len(directions) > 1 else best_step(model)[None]
            if quality == "model":
                values.append(model.change(coefficients))
            else:
                terms = list(zip(coefficients, directions, strict=True))
                values.append(self.local.trial(evaluation.tapes, terms))
        return torch.stack(candidates)[torch.nan_to_num(torch.stack(values), nan=torch.inf).argmin()]
