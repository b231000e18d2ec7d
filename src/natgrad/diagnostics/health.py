"""How well conditioned each layer's factors are, and how damping is split between them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import Factors, entries
from natgrad.curvature.pairs import is_pair
from natgrad.damping import ExactTikhonov, FactoredTikhonov, pi
from natgrad.linalg.spd import safe_eigh


@dataclass(frozen=True)
class LayerHealth:
    """The factors of one layer in four numbers.

    Attributes:
        condition_A, condition_G: the largest eigenvalue by the smallest; ∞ where the smallest is rounding (dead inputs,
            fewer rows than dimensions), 1 for a factor that is zero, NaN for one that is not finite.
        pi: π, how factored damping is split: ``A + π γ I`` and ``G + γ/π I`` [KFAC, sec. 6.3].
        condition: that of the damped block, which is inverted: ``(A + π γ I) ⊗ (G + γ/π I)``, or with exact damping
            ``A ⊗ G + λ I``.
    """

    condition_A: float
    condition_G: float
    pi: float
    condition: float


def layer_health(
    factors: Mapping[str, Factors],
    damping: float | Tensor | Mapping[str, float] = 0.0,
    form: FactoredTikhonov | ExactTikhonov = FactoredTikhonov(),
) -> dict[str, LayerHealth]:
    """Condition numbers and π of every layer, from the eigenvalues of its factors.

    A layer that is a stack of blocks (grouped convolutions) reports its worst block; its π is the geometric mean.
    Decomposes every factor: ask for it now and then, not at every step. Waits for the device once.

    Args:
        factors: by layer, as ``natgrad.kronecker_fisher(...).factors`` has them; those of pairs of layers are passed
            over.
        damping: λ (γ²), the coefficient of the identity, or one for each layer.
        form: how damping enters the inverse.
    """
    rows: dict[str, Tensor] = {}
    for name, block in factors.items():
        if is_pair(name):
            continue
        own = damping[name] if isinstance(damping, Mapping) else damping
        rows[name] = _numbers(block, own, form).cpu().double()
    if not rows:
        return {}
    return {name: LayerHealth(*row.tolist()) for name, row in rows.items()}


def _numbers(block: Factors, damping: float | Tensor, form: FactoredTikhonov | ExactTikhonov) -> Float[Tensor, " 4"]:
    A, G = entries(block.A), entries(block.G)
    ratio = pi(A, G, form.pi if isinstance(form, FactoredTikhonov) else "trace")
    (a_low, a_high), (g_low, g_high) = _extremes(A), _extremes(G)
    added = torch.as_tensor(damping, dtype=a_high.dtype, device=a_high.device)
    if isinstance(form, FactoredTikhonov):
        gamma = added.sqrt()
        whole = _condition(a_low, a_high, ratio * gamma) * _condition(g_low, g_high, gamma / ratio)
    else:
        whole = _condition(a_low * g_low, a_high * g_high, added)
    zero = torch.zeros_like(added)
    worst = [x.amax() for x in (_condition(a_low, a_high, zero), _condition(g_low, g_high, zero), whole)]
    return torch.stack([worst[0], worst[1], ratio.log().mean().exp().to(worst[0].dtype), worst[2]])


def _extremes(M: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest eigenvalue; the smallest is 0 where it is rounding."""
    if M.ndim == 1:
        return M.amin(-1).clamp(min=0), M.amax(-1)
    values = safe_eigh(M).values
    rounding = M.shape[-1] * torch.finfo(M.dtype).eps * values[..., -1]
    low = torch.where(values[..., 0] > rounding, values[..., 0], 0.0)
    return torch.where(torch.isfinite(values[..., 0]), low, values[..., 0]), values[..., -1]


def _condition(low: Tensor, high: Tensor, added: Tensor) -> Tensor:
    ratio = (high + added) / (low + added)
    return torch.where(high + added == 0, torch.ones_like(ratio), ratio)
