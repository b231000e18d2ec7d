"""The health of the factors that an optimiser uses right now."""

from typing import TYPE_CHECKING

from natgrad.damping import ExactTikhonov
from natgrad.diagnostics.health import LayerHealth, layer_health
from natgrad.optim.eigen_adam import EigenAdam
from natgrad.optim.kfac import KFAC
from natgrad.optim.preconditioned import Preconditioned
from natgrad.optim.preconditioner import Preconditioner

if TYPE_CHECKING:
    from torch import Tensor


def health(optimizer: Preconditioner | Preconditioned | KFAC | EigenAdam) -> dict[str, LayerHealth]:
    """Condition numbers and π of every covered layer, from the averaged factors and the damping in use.

    `EigenAdam` has no damping: its ``condition`` is that of ``A ⊗ G``. See `natgrad.diagnostics.layer_health`, also for
    what it costs.

    Args:
        optimizer: holds factors. Before its first estimate there are none, and the result is empty.

    Raises:
        TypeError: it is of another kind.
    """
    if isinstance(optimizer, Preconditioned):
        optimizer = optimizer.pre
    damping: float | Tensor | dict[str, float]
    if isinstance(optimizer, Preconditioner):
        damping, form = optimizer._damping, optimizer._inverses.form
        if optimizer._inputs_only:  # (A + λ/α I) ⊗ α I
            form = ExactTikhonov()
    elif isinstance(optimizer, KFAC):
        damping, form = optimizer._gamma**2, optimizer.proposals.form
    elif isinstance(optimizer, EigenAdam):
        damping, form = 0.0, ExactTikhonov()
    else:
        raise TypeError(
            "health: expected a Preconditioner, Preconditioned, KFAC or EigenAdam (inside other loops: your own "
            f"object, not the loop's wrapper), got {type(optimizer).__name__}"
        )
    return layer_health(optimizer._running.factors, damping, form)
