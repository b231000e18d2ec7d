"""A weighted sum of operators plus a multiple of the identity: what a truncated-Newton step solves with."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.model_view import ModelView
from natgrad.operators.base import LinearOperator


class DampedSum(LinearOperator):
    """``Σ_i w_i C_i + damping I`` over the parameters, of symmetric operators C_i.

    Args:
        view: the model.
        parts: functions that return the C_i: an operator that is there, or one that is made for every product anew.
        weights: the w_i, 0-d tensors or numbers.
        damping: the coefficient of the identity.

    Attributes:
        products: how many products with single vectors there have been.
    """

    def __init__(
        self,
        view: ModelView,
        parts: Sequence[Callable[[], LinearOperator]],
        weights: Sequence[Tensor | float],
        damping: Float[Tensor, ""] | float,
    ) -> None:
        p = view.num_parameters
        super().__init__((p, p), dtype=view.dtype, device=view.device, domain=view, codomain=view, symmetric=True)
        self._parts, self._weights = list(parts), list(weights)
        self.damping = damping if not isinstance(damping, Tensor) else damping.to(view.dtype)
        self.products = 0

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        self.products += v.shape[1]
        total: Tensor | None = None
        for part, weight in zip(self._parts, self._weights, strict=True):
            product = part() @ v
            if total is None:
                total = product if isinstance(weight, float) and weight == 1.0 else product * weight
            else:
                total = total.addcmul_(product, torch.as_tensor(weight, dtype=v.dtype, device=v.device))
        assert total is not None  # there is at least one part
        if isinstance(self.damping, Tensor):
            return total.addcmul_(v, self.damping)
        return total.add_(v, alpha=self.damping)
