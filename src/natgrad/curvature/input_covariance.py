r"""The amortised covariance preconditioner's matrix: ``F_in = A ⊗ α I`` [THESIS, sec. 6.3.2].

It ignores how output neurons interact. Its damped inverse needs a factor of the layer's input alone:
``(A ⊗ α I + damping I)^{-1} = (A + damping/α I)^{-1} ⊗ I/α``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, LayerSums, Statistics, to_dense
from natgrad.curvature.block_inverse import FactoredInverse
from natgrad.curvature.kfac import check_captured
from natgrad.curvature.layer_sums import input_sums, leading_use
from natgrad.layers.capture import Capture, Record
from natgrad.likelihoods import Likelihood
from natgrad.linalg.spd import safe_eigh, spd_inverse
from natgrad.model_view import ModelView


def collect_inputs(
    view: ModelView,
    capture: Capture,
    likelihood: Likelihood,
    x: Any,
    *,
    y: Any = None,
    weight: Tensor | None = None,
    share: float = 1.0,
) -> Statistics:
    """Statistics of one batch's layer inputs; every G is the identity. No backward pass."""
    with view.curvature_pass(), view.snapshot():
        with torch.enable_grad(), capture.record() as record:
            z = view(x)
        record = record.take(z)
        check_captured(record, z)
        return input_statistics(record, z.shape[0], share)


@torch.no_grad()
def input_statistics(record: Record, batch: int, share: float = 1.0) -> Statistics:
    """The same from a recorded forward pass of so many examples, or from the first ones of them."""
    rows = math.ceil(share * batch)
    uses = {
        name: [leading_use(record.blocks[name], use, rows, batch) for use in found]
        for name, found in record.uses.items()
    }
    device = next((calls[0].input.device.type for calls in uses.values()), "cpu")
    with torch.autocast(device, enabled=False):
        sums = {name: input_sums(block, uses.get(name, []), rows) for name, block in record.blocks.items()}
    layers = {name: LayerSums(s.A, to_dense(s.A).new_ones(s.G.shape[0]) * s.rows, s.rows) for name, s in sums.items()}
    return Statistics(layers, float(rows), float(rows)).standing_for(batch)


def input_covariance_factors(factors: dict[str, Factors], alpha: float) -> dict[str, Factors]:
    """``A`` and ``α I`` of every layer."""
    return {name: Factors(f.A, Diagonal(to_dense(f.A).new_full((f.G.shape[0],), alpha))) for name, f in factors.items()}


def input_covariance_inverse(
    factors: Factors, damping: float | Tensor, alpha: float, what: str = "the block"
) -> FactoredInverse:
    """``(A + damping/α I)^{-1} ⊗ I/α``.

    Raises:
        ValueError: A is singular to working precision and the damping does not mend it; a damping is proposed.
    """
    A = to_dense(factors.A)
    if float(damping) == 0:
        values = safe_eigh(A, check=True, what=f"A of {what}").values
        if values[0] <= values[-1] * torch.finfo(values.dtype).eps * len(values):
            proposal = 1e-3 * alpha * float(values.mean()) or 1e-3
            raise ValueError(
                f"A of {what} is singular and has no undamped inverse; pass a damping, for example {proposal:.1e}"
            )
    inverse, ok = spd_inverse(A, damping / alpha, check=True, what=f"A of {what}")
    return FactoredInverse(inverse, A.new_full((factors.G.shape[0],), 1 / alpha), ok)
