"""Values of λ and γ chosen by trying them: the start of λ, and the γ rule [KFAC, sec. 6.6]."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.optim.evaluation import Evaluation
from natgrad.optim.local_model import LocalModel
from natgrad.optim.proposal import Proposals
from natgrad.quadratic import best_coefficients, best_step

# The search for λ at the first update: from 1 (without η) uphill or downhill in decades, so many at most.
_DECADES = 6


@dataclass
class Trials:
    """Judges candidates by the update that each would make.

    Args:
        local: M(δ) and h(θ + δ).
        proposals: Δ under a damping.
    """

    local: LocalModel
    proposals: Proposals

    def first_damping(
        self, evaluation: Evaluation, ratio: float, l2: float, scratch: Float[Tensor, " size"]
    ) -> Float[Tensor, ""]:
        """The power of ten λ whose update lowers the loss of the first batch most, as found downhill from λ = 1.

        Args:
            evaluation: of the first batch.
            ratio: of γ and √(λ + η).
            l2: η.
            scratch: a flat buffer.
        """
        values: dict[int, float] = {}

        def loss(exponent: int) -> float:
            if exponent not in values:
                damping = torch.tensor(10.0**exponent + l2, dtype=torch.float64, device=scratch.device)
                self.proposals.refresh(ratio**2 * damping)
                self.proposals.write(evaluation, ratio**2 * damping, scratch)
                model, _ = self.local.subspaces(evaluation.tapes, evaluation.gradient, [scratch], damping)
                value = float(self.local.trial(evaluation.tapes, [(best_step(model), scratch)]))
                values[exponent] = value if math.isfinite(value) else math.inf
            return values[exponent]

        best = 0
        for direction in (1, -1):
            while abs(best) < _DECADES and loss(best + direction) < loss(best):
                best += direction
        return torch.tensor(10.0**best, dtype=torch.float64, device=scratch.device)

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
