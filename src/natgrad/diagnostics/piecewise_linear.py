"""One layer of a piecewise-linear network under squared error: its Hessian, and the Kronecker product in its place."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from natgrad.diagnostics.passes import exact_pass
from natgrad.likelihoods import Gaussian
from natgrad.linalg.bilinear import kronecker_approximation, summed_hessian
from natgrad.model_view import Forward


@dataclass(frozen=True)
class PiecewiseLinearHessian:
    """Of ``½ Σ_i ‖y_i − z_i‖²`` with respect to one layer's ``[W b]``, columns stacked.

    Attributes:
        total: ``Σ_i ā_i ā_iᵀ ⊗ B_i B_iᵀ``, exact wherever no unit is at a kink.
        approximation: ``1/n (Σ ā āᵀ) ⊗ (Σ B Bᵀ)``.
    """

    total: Float[Tensor, "size size"]
    approximation: Float[Tensor, "size size"]

    @property
    def relative_error(self) -> float:
        """Of the approximation, in the Frobenius norm."""
        return float((self.total - self.approximation).norm() / self.total.norm())


def piecewise_linear_hessian(
    model: nn.Module, x: Any, layer: str, *, forward: Forward | None = None
) -> PiecewiseLinearHessian:
    r"""The Hessian of one layer from ``z_i = B_iᵀ [W b] ā_i + const`` [NEWTON, "Piecewise Linear Network"].

    Between kinks the output is linear in one layer's weights, so that the total Hessian is a sum of Kronecker products,
    one per example. It does not depend on the targets.

    Args:
        model: linear layers and piecewise-linear activations (ReLU and the like).
        x: one batch.
        layer: the name of an ``nn.Linear``, used once per example.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Raises:
        ValueError: there is no such layer.
    """
    found = exact_pass(model, Gaussian(normalizer="none"), x, forward=forward)
    if layer not in found.inputs:
        raise ValueError(f"layer={layer!r}: this model's layers are {', '.join(map(repr, found.inputs))}")
    A = [a[:, None] for a in found.inputs[layer]]
    B = [g.T for g in found.derivatives[layer].movedim(1, 0)]  # out × outputs of the model: ∂z/∂s, transposed
    return PiecewiseLinearHessian(summed_hessian(A, B), kronecker_approximation(A, B))
