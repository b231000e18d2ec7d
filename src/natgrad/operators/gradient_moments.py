"""Second moments of per-example gradients: the empirical Fisher and the gradient covariance of TONGA."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.jacobian_products import as_view, differentiable
from natgrad.operators.sandwich import JacobianSandwich


class EmpiricalFisher(JacobianSandwich):
    """The uncentred second moment (1/N) Σ_n g_n g_nᵀ of the gradients g_n of each example's own summed nll.

    Not the Fisher: the targets are those of the data [KFAC, sec. 5; NATGRAD, sec. 4.1]. No per-example gradient is ever
    stored: g_n = J_nᵀ s_n with s_n = ∂nll_n/∂z_n, so that a product takes one J v, one inner product per example and
    one Jᵀ u.

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch of N examples.
        y: its targets.
        weight: per-element weights as in ``likelihood.nll``; they multiply each example's gradient.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError: batch normalisation in train mode couples the examples, so that no example has a gradient of its
            own; see also `Jacobian`.
        TypeError: the likelihood lacks a method.
    """

    centered = False

    def __init__(
        self,
        model: nn.Module | ModelView,
        likelihood: Likelihood,
        x: Any,
        y: Any,
        *,
        weight: Tensor | None = None,
        forward: Forward | None = None,
        chunk_size: int | None = None,
    ) -> None:
        view = as_view(model, forward)
        check_examples_apart(view, type(self).__name__)
        super().__init__(view, likelihood, x, None, chunk_size)
        with differentiable():
            z = self._products.z.clone().requires_grad_()
            summed = likelihood.nll(z, y, weight=weight, count=z.new_ones(()))
            (self._score,) = torch.autograd.grad(summed, z)

    def _output_product(self, u: Float[Tensor, "k batch ..."]) -> Float[Tensor, "k batch ..."]:
        projections = (u * self._score).flatten(2).sum(2) if u.ndim > 2 else u * self._score
        if self.centered:
            projections = projections - projections.mean(dim=1, keepdim=True)
        spread = projections.reshape(*projections.shape, *([1] * (u.ndim - 2)))
        return spread * self._score / self._score.shape[0]


class GradientCovariance(EmpiricalFisher):
    """The covariance C = (1/N) Σ_n (g_n − ḡ)(g_n − ḡ)ᵀ of per-example gradients, TONGA's metric [NATGRAD, sec. 4].

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch of N examples.
        y: its targets.
        centered: False gives U, the uncentred second moment (`EmpiricalFisher`).
        weight: per-element weights as in ``likelihood.nll``; they multiply each example's gradient.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError, TypeError: as for `EmpiricalFisher`.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        likelihood: Likelihood,
        x: Any,
        y: Any,
        *,
        centered: bool = True,
        weight: Tensor | None = None,
        forward: Forward | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(model, likelihood, x, y, weight=weight, forward=forward, chunk_size=chunk_size)
        self.centered = centered


def check_examples_apart(view: ModelView, what: str) -> None:
    """Refuse models in which an example's output depends on the others, so that none has a gradient of its own.

    Args:
        view: the model.
        what: what is then not defined.

    Raises:
        ValueError: batch normalisation by the statistics of the batch.
    """
    for name, module in view.module.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"model: {type(module).__name__} {name!r} normalises by the statistics of the batch, so that no "
                f"example has a gradient of its own and {what} is not defined; call model.eval() first"
            )
