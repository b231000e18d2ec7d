"""One batch's layer inputs and output derivatives, kept whole: for small models and the questions asked of them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.cotangents import cotangents
from natgrad.curvature.kfac import check_captured, output_gradients, trainable_parts
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Coverage, cover
from natgrad.layers.factors import with_ones
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView, batch_size
from natgrad.operators.sandwich import check_likelihood


@dataclass(frozen=True)
class Pass:
    """What a forward and all backward passes left behind.

    Attributes:
        view: the model.
        coverage: its layers.
        inputs: ā of every layer, ``[N, columns]``.
        derivatives: g of every layer for a set of cotangents c with ``Σ_c c cᵀ = F_R``, ``[k, N, out]``: what is linear
            in ``g gᵀ`` has its exact expectation over targets as a sum over k.
        z: the output.
        scale: ``N / count``: what turns a mean over examples into the scale of ``likelihood.nll``.
    """

    view: ModelView
    coverage: Coverage
    inputs: dict[str, Float[Tensor, "examples columns"]]
    derivatives: dict[str, Float[Tensor, "k examples out"]]
    z: Float[Tensor, "examples ..."]
    scale: Float[Tensor, ""]


def linear_layers(view: ModelView) -> Coverage:
    """The ``nn.Linear`` layers of a model that has trainable parameters nowhere else.

    Raises:
        ValueError: a trainable parameter belongs to no such layer; it is named.
    """
    coverage = cover(view, uncovered="identity", structure="layerwise")
    if coverage.uncovered:
        named = ", ".join(f"{name} ({reason})" for name, reason in coverage.reasons.items())
        raise ValueError(
            f"model: expected trainable parameters in nn.Linear layers alone, got {named}; freeze those with "
            "requires_grad_(False)"
        )
    return coverage


def exact_pass(
    model: nn.Module, likelihood: Likelihood, x: Any, *, y: Any = None, forward: Forward | None = None
) -> Pass:
    """Evaluate a batch once, and differentiate it for all of F_R.

    Args:
        model: a model whose trainable parameters are those of ``nn.Linear`` layers, each used once per example.
        likelihood: p(y | z).
        x: one batch.
        y: targets, where the curvature depends on them (class weights, ignored targets).
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Raises:
        ValueError: a parameter outside of linear layers, or a layer that is not used once per example.
    """
    check_likelihood(likelihood)
    batch_size(x)
    view = ModelView(model, forward)
    coverage = linear_layers(view)
    capture = Capture(model, coverage.layers)
    try:
        with view.curvature_pass(), view.snapshot():
            with torch.enable_grad(), capture.record() as record:
                z = view(x)
            check_captured(record, z)
            with torch.no_grad():
                stacks = cotangents(likelihood, z.detach(), expectation="exact", targets=y)
                found = [gradients for stack in stacks for gradients in output_gradients(record, z, stack)]
                calls = record.inputs
    finally:
        capture.remove()
    inputs, derivatives = {}, {}
    for name, layer in coverage.layers.items():
        if len(calls.get(name, [])) != 1 or calls[name][0].shape[:-1] != z.shape[:1]:
            shapes = [tuple(a.shape) for a in calls.get(name, [])]
            raise ValueError(
                f"layer {name!r} is called with inputs of shapes {shapes}; expected one call with one row for each of "
                f"the {z.shape[0]} examples"
            )
        weight, bias = trainable_parts(layer)
        a = calls[name][0]
        inputs[name] = with_ones(a, bias) if weight else a.new_ones(len(a), 1)
        derivatives[name] = torch.stack([gradients[name][0] for gradients in found])
    z = z.detach()
    scale = z.shape[0] / torch.as_tensor(likelihood.count(z, y), dtype=z.dtype, device=z.device)
    return Pass(view, coverage, inputs, derivatives, z, scale)
