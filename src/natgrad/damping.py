"""How a damping enters the inverse of a Kronecker block: factored or exact Tikhonov.

``damping`` is always the coefficient of the identity in [KFAC, eq. 6], λ + η or γ², never its root. The rules that
move λ and γ are in :mod:`natgrad.damping_rules`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.iterative import NewtonSchulz
from natgrad.linalg.low_rank import LowRank
from natgrad.linalg.spd import safe_eigh

PiNorm = Literal["trace", "frobenius", "spectral", "one"]


@dataclass(frozen=True)
class FactoredTikhonov:
    r"""``((A + π γ I) ⊗ (G + γ/π I))^{-1}`` with ``γ = √damping`` [KFAC, sec. 6.3, eq. 7].

    Cheaper than :class:`ExactTikhonov` (two Cholesky inverses, two products to apply), but its expansion holds the
    extra term ``π γ I ⊗ G + A ⊗ γ/π I``, so that it damps more.

    Args:
        pi: the norm ν in ``π = √(‖A ⊗ I‖_ν / ‖I ⊗ G‖_ν)``: ``"trace"`` (the paper's choice), ``"frobenius"``,
            ``"spectral"``, or ``"one"`` for π = 1.
        solver: how the damped factors are inverted: None by Cholesky; :class:`natgrad.linalg.NewtonSchulz`, an
            iteration that starts from the inverse before; :class:`natgrad.linalg.LowRank`, low rank plus a diagonal,
            an approximation [KFAC, sec. 8]. For the block-diagonal form.
    """

    pi: PiNorm = "trace"
    solver: NewtonSchulz | LowRank | None = None

    def __post_init__(self) -> None:
        if self.pi not in get_args(PiNorm):
            raise ValueError(
                f"FactoredTikhonov(pi={self.pi!r}): expected one of {', '.join(map(repr, get_args(PiNorm)))}"
            )
        if not isinstance(self.solver, NewtonSchulz | LowRank | None):
            raise TypeError(
                f"FactoredTikhonov(solver={self.solver!r}): expected NewtonSchulz(...), LowRank(...) or None"
            )

    def split(self, A: Tensor, G: Tensor, damping: float | Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """``(π γ, γ / π)``: what is added to the diagonals of A and of G.

        Args:
            A: a matrix, or a vector that stands for a diagonal one.
            G: likewise.
            damping: γ².
        """
        check_damping(damping)
        ratio = pi(A, G, self.pi)
        gamma = torch.as_tensor(damping, dtype=ratio.dtype, device=ratio.device).sqrt()
        return ratio * gamma, gamma / ratio


@dataclass(frozen=True)
class ExactTikhonov:
    r"""``(A ⊗ G + damping I)^{-1}``, in the eigenbasis of the factors [KFAC, eq. 6].

    The basis does not depend on the damping: a new damping costs no new decomposition.
    """


def pi(A: Tensor, G: Tensor, norm: PiNorm = "trace") -> Float[Tensor, ""]:
    r"""``π = √(‖A ⊗ I‖_ν / ‖I ⊗ G‖_ν)`` [KFAC, sec. 6.3].

    - trace: ``√((tr A / d_A) / (tr G / d_G))``; d_A counts the homogeneous coordinate.
    - frobenius: ``√((‖A‖_F / √d_A) / (‖G‖_F / √d_G))``.
    - spectral: ``√(‖A‖₂ / ‖G‖₂)``.
    - one: 1.

    Args:
        A: symmetric positive semi-definite, or a vector that stands for a diagonal matrix; or a stack of matrices.
        G: likewise.
        norm: the norm ν.

    Returns:
        a 0-d tensor, for a stack one of each; 1 where a factor is zero, for then no ratio balances them.
    """
    if norm == "one":
        return torch.ones((), dtype=A.dtype, device=A.device)
    size_a, size_g = _scaled_norm(A, norm), _scaled_norm(G, norm)
    ratio = (size_a / size_g).sqrt()
    return torch.where((size_a > 0) & (size_g > 0), ratio, torch.ones_like(ratio))


def check_damping(damping: float | Tensor) -> None:
    """Refuse a negative or NaN number; tensors are not read, because that would synchronise.

    Raises:
        ValueError: the damping is not a non-negative number.
    """
    if not isinstance(damping, Tensor) and not damping >= 0:
        raise ValueError(f"damping={damping}: expected a non-negative number, the coefficient of the identity")


def _scaled_norm(M: Tensor, norm: str) -> Float[Tensor, ""]:
    """‖M ⊗ I‖_ν up to the factor that both sides share."""
    diagonal = M if M.ndim == 1 else M.diagonal(dim1=-2, dim2=-1)
    if norm == "trace":
        return diagonal.mean(-1)
    if norm == "frobenius":
        return (M if M.ndim == 1 else M.flatten(-2)).square().sum(-1).sqrt() / M.shape[-1] ** 0.5
    return M.max() if M.ndim == 1 else safe_eigh(M).values[..., -1]
