"""Making an update, and taking it back: θ + δ is tried, then a shorter step along δ, then θ stays."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.optim.evaluation import Evaluation
from natgrad.optim.local_model import LocalModel, mean_nll
from natgrad.optim.select import keep_where, reads_for_free
from natgrad.optim.settings import StepGuard
from natgrad.quadratic import Subspace, reduction_ratio, rounding_of


@dataclass(frozen=True)
class Verdict:
    """What became of an update.

    Args:
        rho: the reduction ratio of the whole update.
        actual: h(θ + δ) − h(θ) of the whole update, or that of the rows held out where it is larger.
        before: h(θ).
        whole: whether the whole update stays.
        accepted: whether it stays, whole or shortened.
        norm: of the update that was tried last.
    """

    rho: Float[Tensor, ""]
    actual: Float[Tensor, ""]
    before: Float[Tensor, ""]
    whole: Bool[Tensor, ""]
    accepted: Bool[Tensor, ""]
    norm: Float[Tensor, ""]


def try_update(
    local: LocalModel,
    evaluation: Evaluation,
    update: Float[Tensor, " size"],
    scratch: Float[Tensor, " size"],
    model: Subspace,
    coefficients: Float[Tensor, " k"],
    guard: StepGuard | None,
    finite: Bool[Tensor, ""],
    lam: Float[Tensor, ""],
) -> Verdict:
    """Move the parameters by an update, by a part of it, or not at all.

    Args:
        local: h on the rows of a batch.
        evaluation: of that batch, before the update.
        update: δ as a flat vector; on return what was made of it, zero where it was rejected.
        scratch: a flat buffer, for the old parameters.
        model: M on the curvature rows.
        coefficients: of δ in it.
        guard: None accepts whatever leaves h finite.
        finite: False takes every update back.
        lam: λ, the part of the damping in M that a rule moves.
    """
    parameters: list[Tensor] = list(local.view.parameters.values())
    old = list(local.layout.parameters(scratch).values())
    parts = list(local.layout.parameters(update).values())
    torch._foreach_copy_(old, parameters)
    before = mean_nll(evaluation.tapes, [tape.nll for tape in evaluation.tapes]) + local.penalty()
    held_before = mean_nll(evaluation.held_out, [rows.nll for rows in evaluation.held_out])

    def rise() -> tuple[Tensor, Tensor]:
        """How much the losses of the curvature rows and of those held out rise by the update as it is."""
        torch._foreach_add_(parameters, parts)
        after, held = local.losses(evaluation.tapes, evaluation.held_out)
        return after + local.penalty() - before, held - held_before

    norm = model.norm(coefficients)
    actual, held = rise()
    noise = rounding_of(before, local.view.dtype)
    damped = lam * norm**2 / (coefficients @ model.curvature @ coefficients)
    rho = reduction_ratio(actual, model.change(coefficients), noise, damped)
    whole = finite & torch.isfinite(actual)
    worst = torch.fmax(actual, held)
    if guard is None:
        accepted = whole
    else:
        accepted = whole = whole & guard.accepts(rho, held_before, held)
        if not reads_for_free(whole) or (finite and not whole):  # reading it is cheaper than a forward pass
            share = torch.where(whole, 1.0, guard.shorter(model, coefficients, worst))
            torch._foreach_copy_(parameters, old)
            update.mul_(share.to(update.dtype))
            again, held = rise()
            ratio = reduction_ratio(again, model.change(share * coefficients), noise, damped)
            second = finite & torch.isfinite(again) & guard.accepts(ratio, held_before, held)
            accepted, norm = whole | second, share * norm
    _keep(parameters, old, accepted)
    keep_where(update, accepted, 0.0)
    return Verdict(rho, worst, before, whole, accepted, norm)


def _keep(parameters: Sequence[Tensor], old: Sequence[Tensor], accepted: Bool[Tensor, ""]) -> None:
    for parameter, value in zip(parameters, old, strict=True):
        keep_where(parameter, accepted, value)
