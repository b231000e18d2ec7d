"""γ chosen by trying: the γ rule [KFAC, sec. 6.6]."""

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.optim.evaluation import Evaluation
from natgrad.optim.local_model import LocalModel
from natgrad.optim.proposal import Proposals
from natgrad.optim.rescaling import LayerCoefficients
from natgrad.quadratic import best_coefficients


def best_gamma(
    local: LocalModel,
    proposals: Proposals,
    coefficients: LayerCoefficients,
    evaluation: Evaluation,
    candidates: tuple[Tensor, ...],
    quality: str,
    damping: Float[Tensor, ""],
    directions: list[Float[Tensor, " size"]],
) -> Float[Tensor, ""]:
    """The γ whose update is best by M(δ) − M(0) (``"model"``) or by h(θ + δ) (``"loss"``) [KFAC, sec. 6.6].

    Args:
        local: M(δ) and h(θ + δ).
        proposals: Δ under a damping.
        coefficients: of its layers' parts.
        evaluation: of a batch.
        candidates: values of γ.
        quality: what is compared.
        damping: λ + η.
        directions: a buffer for Δ, and δ₀ where there is momentum.
    """
    values = []
    for gamma in candidates:
        proposals.write(evaluation, gamma**2, directions[0], fresh=True)
        coefficients.apply(directions[0])
        products = local.layout.inner_products([evaluation.gradient, *directions], directions)
        model, _ = local.subspaces(evaluation.tapes, products, directions, damping)
        best = best_coefficients(model)
        if quality == "model":
            values.append(model.change(best))
        else:
            terms = list(zip(best, directions, strict=True))
            values.append(local.trial(evaluation.tapes, terms))
    return torch.stack(candidates)[torch.nan_to_num(torch.stack(values), nan=torch.inf).argmin()]
