r"""Distances whose Hessians are block-diagonal Fisher matrices [KFAC, sec. 12].

With ``s_i = W_i ā_{i−1}`` at θ and ``s'_i = W'_i ā_{i−1}``, the inputs being those at θ in both:

- Heskes' distance ``D(θ', θ) = ½ Σ_i E[(s_i − s'_i)ᵀ G_i (s_i − s'_i)]`` has the Hessian F̆;
- the sums of layer-wise KL divergences, in either direction, have the exact blocks of F as their Hessian at θ' = θ.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.base import to_dense
from natgrad.curvature.fisher import kronecker_fisher
from natgrad.diagnostics.passes import exact_pass, linear_layers
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import MeanParametrised
from natgrad.model_view import Forward, ModelView


class HeskesDistance:
    """``D(θ', θ)`` as a differentiable function of θ' [KFAC, sec. 12]; θ are the model's parameters when this is made.

    Args:
        model: a model of ``nn.Linear`` layers, each used once per example.
        likelihood: p(y | z); the scale is that of its ``nll``.
        x: one batch, over which the expectations run.
        y: targets, where the curvature depends on them.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, x: Any, *, y: Any = None, forward: Forward | None = None
    ) -> None:
        found = exact_pass(model, likelihood, x, y=y, forward=forward)
        k = kronecker_fisher(model, likelihood, x, expectation="exact", y=y, forward=forward)
        self.view, self._members = found.view, found.coverage.members
        self._inputs = found.inputs
        self._G = {name: to_dense(factors.G) for name, factors in k.factors.items()}
        self._start = {name: p.detach().clone() for name, p in self.view.parameters.items()}

    def __call__(self, parameters: Float[Tensor, " P"] | Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """``D(θ', θ)``.

        Args:
            parameters: θ', flat or by name.
        """
        given = self.view.to_dict(parameters) if isinstance(parameters, Tensor) else parameters
        total: Tensor | None = None
        for name, (weight, bias) in self._members.items():
            parts = [given[m] - self._start[m] for m in (weight, bias) if m is not None]
            change = torch.cat([part if part.ndim == 2 else part[:, None] for part in parts], dim=1)
            s = self._inputs[name] @ change.T
            term = 0.5 * torch.einsum("no,op,np->", s, self._G[name], s) / len(s)
            total = term if total is None else total + term
        assert total is not None  # a model has a covered layer
        return total


def layerwise_kl(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    parameters: Float[Tensor, " P"] | Mapping[str, Tensor],
    *,
    reverse: bool = False,
    forward: Forward | None = None,
) -> Float[Tensor, ""]:
    r"""``Σ_i E[KL(P_{y|s_i} ‖ P_{y|s'_i})]``, on the scale of ``likelihood.nll`` [KFAC, sec. 12].

    One forward pass per layer: to change s_i alone is to change that layer's parameters alone. Differentiable in
    ``parameters``; its Hessian at the model's own parameters is the block-diagonal of the exact Fisher matrix.

    Args:
        model: any model whose trainable parameters are those of ``nn.Linear`` layers.
        likelihood: p(y | z), a distribution whose nll is determined by its mean: all built-in ones.
        x: one batch.
        parameters: θ', flat or by name.
        reverse: ``KL(P_{y|s'_i} ‖ P_{y|s_i})`` instead.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Raises:
        TypeError: the likelihood does not know its mean.
        ValueError: its nll is no plain negative log-likelihood (label smoothing, weights that depend on targets).
    """
    if not isinstance(likelihood, MeanParametrised):
        raise TypeError(f"likelihood: {type(likelihood).__name__} has no to_mean(z); expected a built-in likelihood")
    if getattr(likelihood, "label_smoothing", 0) or getattr(likelihood, "needs_targets", False):
        raise ValueError(
            f"likelihood: {likelihood} has label smoothing or weights that depend on the targets, so that its nll is "
            "not that of a distribution; expected one without"
        )
    view = ModelView(model, forward)
    given = view.to_dict(parameters) if isinstance(parameters, Tensor) else parameters
    own = {name: p.detach() for name, p in view.parameters.items()}
    with torch.no_grad():
        z = view.functional(own, x)
    total = z.new_zeros(())
    for members in linear_layers(view).members.values():
        changed = {member: given[member] for member in members if member is not None}
        z_changed = view.functional({**own, **changed}, x)
        of, other = (z_changed, z) if reverse else (z, z_changed)
        mean = likelihood.to_mean(of)  # the nll is linear in y, or quadratic with a constant: its mean is that of y's
        total = total + likelihood.nll(other, mean) - likelihood.nll(of, mean)
    return total
