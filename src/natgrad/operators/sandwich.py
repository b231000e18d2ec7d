"""The form Jᵀ M J that nearly all exact curvature has, as an operator without matrices."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.base import LinearOperator
from natgrad.operators.chain_products import frozen_products
from natgrad.operators.jacobian_products import JacobianProducts, as_view, join_columns


class JacobianSandwich(LinearOperator):
    """Jᵀ M J with J the Jacobian of the output z; a subclass supplies M, symmetric, as `_output_product`.

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch, or its `JacobianProducts` made before, which several operators and a gradient may share.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        likelihood: Likelihood,
        x: Any,
        forward: Forward | None,
        chunk_size: int | None,
    ) -> None:
        check_likelihood(likelihood)
        view = as_view(model, forward)
        self.likelihood = likelihood
        self._products = x if isinstance(x, JacobianProducts) else frozen_products(view, x, chunk_size)
        p = view.num_parameters
        super().__init__((p, p), dtype=view.dtype, device=view.device, domain=view, codomain=view, symmetric=True)

    def _output_product(self, u: Float[Tensor, "k batch ..."]) -> Float[Tensor, "k batch ..."]:
        """The product of M, the curvature of the loss in the outputs, with every u."""
        raise NotImplementedError(f"{type(self).__name__} must implement _output_product")

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        products = self._products
        parts = [products.vjp(self._output_product(products.jvp(v[:, columns]))) for columns in products.chunks(v)]
        return join_columns(parts)

    def _form(self, u: Float[Tensor, "P j"], v: Float[Tensor, "P k"]) -> Float[Tensor, "j k"]:
        # (J u)ᵀ M (J v): no backward pass
        left = torch.cat([self._products.jvp(u[:, columns]) for columns in self._products.chunks(u)])
        right = left
        if u is not v:
            right = torch.cat([self._products.jvp(v[:, columns]) for columns in self._products.chunks(v)])
        return (left.flatten(1) @ self._output_product(right).flatten(1).T).to(self.dtype)


def check_likelihood(likelihood: Any) -> None:
    """Raises a TypeError where the likelihood lacks what the operators need."""
    missing = [m for m in ("nll", "count", "fisher_product") if not callable(getattr(likelihood, m, None))]
    if missing or isinstance(likelihood, type):
        what = f"the class {likelihood.__name__}" if isinstance(likelihood, type) else type(likelihood).__name__
        raise TypeError(
            f"likelihood: expected an object like natgrad.Categorical(), with nll, count and fisher_product; got "
            f"{what}" + (f", which lacks {', '.join(missing)}" if missing else "")
        )
