"""ACP's inverses for the preconditioner: one factor per layer, that of its input."""

import math
from collections.abc import Mapping

from torch import Tensor

from natgrad.curvature.base import Factors, to_dense
from natgrad.curvature.block_inverse import FactoredInverse
from natgrad.curvature.input_covariance import input_covariance_factors
from natgrad.curvature.running import RunningFactors
from natgrad.damping import FactoredTikhonov
from natgrad.linalg.spd import spd_inverse
from natgrad.optim.inverses import LayerInverses


class InputInverses(LayerInverses):
    """``(A ⊗ α I + damping I)^{-1} = (A + damping/α I)^{-1} ⊗ I/α``, exact [THESIS, sec. 6.4.2].

    Args:
        alpha: α.

    Raises:
        ValueError: α is not positive.
    """

    def __init__(self, alpha: float) -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha={alpha}: expected a positive number")
        super().__init__(FactoredTikhonov())
        self.alpha = alpha

    def observe(self, estimate: Mapping[str, Factors], running: RunningFactors, usable: Tensor) -> Tensor:
        """Take an estimate into the averages, its G being α I."""
        return super().observe(input_covariance_factors(dict(estimate), self.alpha), running, usable)

    def refresh(self, factors: Mapping[str, Factors], damping: float | Tensor) -> None:
        """Invert anew; a layer whose factorisation fails keeps what it had."""
        for name, block in factors.items():
            A = to_dense(block.A)
            inverse, ok = spd_inverse(A, damping / self.alpha)
            if bool(ok):
                self._kept[name] = FactoredInverse(inverse, A.new_full((block.G.shape[0],), 1 / self.alpha), ok)
            else:
                self.failures += 1
