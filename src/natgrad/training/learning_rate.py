"""The learning rate from the largest eigenvalue of the Hessian."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood
from natgrad.linalg.lanczos import lanczos
from natgrad.model_view import Forward
from natgrad.operators.autodiff import Hessian


def inverse_largest_eigenvalue(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Any,
    *,
    steps: int = 30,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
) -> Float[Tensor, ""]:
    r"""``1 / λ_max`` of the Hessian of ``likelihood.nll``: a learning rate for gradient descent [THESIS, sec. 3.1.2].

    Y. LeCun, P. Simard, B. Pearlmutter, "Automatic learning rate maximization by on-line estimation of the Hessian's
    eigenvectors", 1993. A step of this length ends at the minimum of the quadratic model along the direction of
    greatest curvature; beyond ``2 / λ_max`` gradient descent diverges on a quadratic. λ_max comes from Lanczos' method
    on Hessian-vector products.

    Args:
        model: any module.
        likelihood: p(y | z).
        x: one batch.
        y: its targets.
        steps: of Lanczos' method, each one product with the Hessian.
        generator: of the starting vector; without one it is the same at every call.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Returns:
        a 0-d tensor.

    Raises:
        ValueError: no eigenvalue is positive, so that the quadratic model gives no length.
    """
    hessian = Hessian(model, likelihood, x, y, forward=forward)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    n = hessian.shape[1]
    start = torch.randn(n, generator=generator, dtype=torch.float64, device=generator.device)
    largest = lanczos(lambda v: hessian @ v, start.to(hessian.device, hessian.dtype), steps).values[-1]
    if not largest > 0:
        raise ValueError(
            f"the largest eigenvalue of the Hessian found in {steps} steps is {float(largest):g}: the loss has no "
            "positive curvature here; move on by a few steps of gradient descent first, or take more steps"
        )
    return 1 / largest
