"""Cholesky factors, inverses and eigenvectors of symmetric matrices that may be nearly singular.

Nothing here raises because of the numbers in a matrix unless asked to: every function returns, beside its result, a
flag that says whether the result can be used. What fails in single precision is tried once more in double precision:
on the second-moment matrices of real data float32 `eigh` has been seen to return NaN, and a damped matrix can lose
definiteness to rounding.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SPDResult(NamedTuple):
    """A matrix, and whether it can be used (a 0-d bool tensor)."""

    value: Float[Tensor, "*stack n n"]
    ok: Bool[Tensor, ""]


class EighResult(NamedTuple):
    """Eigenvalues in ascending order, eigenvectors as columns, and whether both can be used (a 0-d bool tensor)."""

    values: Float[Tensor, "*stack n"]
    vectors: Float[Tensor, "*stack n n"]
    ok: Bool[Tensor, ""]


def safe_cholesky(M: Float[Tensor, "n n"], *, check: bool = False, what: str = "the matrix") -> SPDResult:
    r"""The lower Cholesky factor L with ``L Lᵀ = M``.

    Args:
        M: symmetric; only its lower triangle is read.
        check: raise instead of returning ``ok = False``.
        what: how an error names the matrix.

    Returns:
        (L, ok) in M's dtype. Where ``ok`` is False, L means nothing.

    Raises:
        ValueError: with ``check``, when M is not positive definite in double precision either.
    """
    L, info = torch.linalg.cholesky_ex(M)
    ok = (info == 0) & torch.isfinite(L.diagonal()).all()
    if not ok and M.dtype != torch.float64 and _has_float64(M):
        L64, info = torch.linalg.cholesky_ex(M.double())
        L = L64.to(M.dtype)
        ok = (info == 0) & torch.isfinite(L.diagonal()).all()
    if check and not ok:
        raise ValueError(_not_definite(M, what))
    return SPDResult(L, ok)


def spd_inverse(
    M: Float[Tensor, "*stack n n"], damping: float | Tensor = 0.0, *, check: bool = False, what: str = "the matrix"
) -> SPDResult:
    r"""``(M + damping I)^{-1}`` of a symmetric positive semi-definite M, by Cholesky.

    About the cost of one matrix product; less than half of a general inverse.

    Args:
        M: symmetric positive semi-definite, or a stack of such matrices; ``ok`` then speaks for all of them.
        damping: the coefficient of the identity, a number or a 0-d tensor; for a stack possibly one for each.
        check: raise instead of returning ``ok = False``.
        what: how an error names the matrix.

    Returns:
        (inverse, ok) in M's dtype; exactly symmetric. Where ``ok`` is False, it is NaN.

    Raises:
        ValueError: with ``check``, when ``M + damping I`` is singular to working precision; proposes a damping.
    """
    L, ok = damped_cholesky(M, damping)
    if check and not (ok and _well_conditioned(L)):
        raise ValueError(_not_definite(M, what, damping))
    if not ok:  # cholesky_inverse raises on a zero pivot
        return SPDResult(torch.full_like(M, torch.nan), ok)
    # The result is symmetric and stored by columns: its transpose is the same matrix stored by rows.
    return SPDResult(torch.cholesky_inverse(L).mT.to(M.dtype), ok)


def damped_cholesky(M: Float[Tensor, "*stack n n"], damping: float | Tensor = 0.0) -> SPDResult:
    """The lower Cholesky factor of ``M + damping I``; in double precision where single precision was not enough.

    Args:
        M: symmetric positive semi-definite, or a stack of such matrices; ``ok`` then speaks for all of them.
        damping: as for :func:`spd_inverse`.

    Returns:
        (L, ok); L is in float64 where it had to be. Where ``ok`` is False, L means nothing.
    """
    if isinstance(damping, Tensor) and damping.ndim:
        damping = damping[..., None]
    damped = M.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    L, info = torch.linalg.cholesky_ex(damped)
    ok = _factorised(L, info)
    if not ok and M.dtype != torch.float64 and _has_float64(M):
        damped = M.double()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        L, info = torch.linalg.cholesky_ex(damped)
        ok = _factorised(L, info)
    return SPDResult(L, ok)


def safe_eigh(M: Float[Tensor, "*stack n n"], *, check: bool = False, what: str = "the matrix") -> EighResult:
    r"""Eigenvalues and eigenvectors of a symmetric matrix, ``M = Q diag(values) Qᵀ``.

    Args:
        M: symmetric, or a stack of such matrices; only the lower triangle is read.
        check: raise instead of returning ``ok = False``.
        what: how an error names the matrix.

    Returns:
        (values ascending, Q, ok) in M's dtype. Where ``ok`` is False, both are NaN.

    Raises:
        ValueError: with ``check``, when M is not finite or the decomposition fails in double precision too.
    """
    dtypes = [M.dtype] if M.dtype == torch.float64 or not _has_float64(M) else [M.dtype, torch.float64]
    if torch.isfinite(M).all():
        for dtype in dtypes:
            try:
                values, vectors = torch.linalg.eigh(M.to(dtype))
            except torch.linalg.LinAlgError:  # eigh has no form that returns its failure
                continue
            if torch.isfinite(values).all() and torch.isfinite(vectors).all():
                return EighResult(
                    values.to(M.dtype), vectors.to(M.dtype), torch.ones((), dtype=torch.bool, device=M.device)
                )
    if check:
        raise ValueError(
            f"no eigendecomposition of {what} {tuple(M.shape)}: it holds NaN or infinite values, or eigh failed"
        )
    return EighResult(
        torch.full_like(M[..., 0], torch.nan), torch.full_like(M, torch.nan), M.new_zeros((), dtype=torch.bool)
    )


def _factorised(L: Tensor, info: Tensor) -> Tensor:
    """Whether a Cholesky factor, or all of a stack, can be used."""
    return (info == 0).all() & torch.isfinite(L.diagonal(dim1=-2, dim2=-1)).all()


def _has_float64(M: Tensor) -> bool:
    return M.device.type != "mps"


def _well_conditioned(L: Float[Tensor, "n n"]) -> bool:
    """Whether the matrix with Cholesky factor L has an inverse with any correct digit, judged by the pivots."""
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    return bool((pivots.amin(-1) > pivots.amax(-1) * L.shape[-1] * torch.finfo(L.dtype).eps).all())


def _not_definite(M: Tensor, what: str, damping: float | Tensor = 0.0) -> str:
    if not torch.isfinite(M).all():
        return f"{what} {tuple(M.shape)} holds NaN or infinite values"
    mean = float(M.diagonal(dim1=-2, dim2=-1).mean())
    proposal = 1e-3 * (mean if mean > 0 else float(M.abs().max()) or 1.0)
    given = float(torch.as_tensor(damping).max())
    return (
        f"{what} {tuple(M.shape)} is singular to working precision with damping={given:g}; "
        f"give a larger damping, for example {proposal:.1e}"
    )
