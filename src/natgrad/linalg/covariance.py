r"""Inverses and inverse square roots of a damped covariance ``C + ε I``, dense or ``scale I − B Bᵀ``.

From n centred rows of d numbers C has at most the rank n. Where n is small against d, the inverse and its root differ
from a multiple of the identity by a matrix of that rank: products with it cost 2 n / d of the dense ones.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.linalg.spd import safe_eigh, spd_inverse


class SymmetricForm(NamedTuple):
    """A symmetric matrix M: ``dense``, or ``scale I + sign basis basisᵀ`` where dense is None.

    ``ok`` is a 0-d bool tensor: whether the matrix can be used.
    """

    dense: Float[Tensor, "d d"] | None
    scale: Float[Tensor, ""]
    basis: Float[Tensor, "d k"]
    ok: Bool[Tensor, ""]
    sign: int = -1

    def right_product(self, X: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        """``X M``."""
        if self.dense is not None:
            return X @ self.dense
        if X.device.type == "cpu":  # where reading a number costs less than one more pass over X
            return torch.addmm(X, X @ self.basis, self.basis.T, beta=self.scale.item(), alpha=self.sign)
        return (X * self.scale).addmm_(X @ self.basis, self.basis.T, alpha=self.sign)

    def right_product_(self, X: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        """``X M``, written over X where M is not dense; X cannot be used afterwards."""
        if self.dense is not None:
            return X @ self.dense
        XB = X @ self.basis
        if X.device.type == "cpu":
            return X.addmm_(XB, self.basis.T, beta=self.scale.item(), alpha=self.sign)
        return X.mul_(self.scale).addmm_(XB, self.basis.T, alpha=self.sign)

    def vector_product(self, v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """``M v``."""
        if self.dense is not None:
            return torch.mv(self.dense, v)
        return (v * self.scale).addmv_(self.basis, torch.mv(self.basis.T, v), alpha=self.sign)

    def add_product(
        self, into: Float[Tensor, "r d"], X: Float[Tensor, "r d"], *, beta: float = 1.0, alpha: float = 1.0
    ) -> None:
        """``into ← beta into + alpha X M``, without a temporary of the size of X where M is dense."""
        if self.dense is not None:
            torch.addmm(into, X, self.dense, beta=beta, alpha=alpha, out=into)
            return
        if beta != 1.0:
            into.mul_(beta)
        into.add_(X * self.scale, alpha=alpha)
        into.addmm_(X @ self.basis, self.basis.T, alpha=self.sign * alpha)

    def to_dense(self) -> Float[Tensor, "d d"]:
        """M itself."""
        if self.dense is not None:
            return self.dense
        return torch.diag(self.scale.expand(self.basis.shape[0])) + self.sign * self.basis @ self.basis.T


def low_rank(rows: int | None, d: int, damping: float = 1.0) -> bool:
    """Whether a form of rank ``rows`` costs less than a dense one; without damping there is none."""
    return rows is not None and 2 * rows < d and damping > 0


def covariance(h: Float[Tensor, "n d"], mean: Float[Tensor, " d"] | None = None) -> Float[Tensor, "d d"]:
    r"""``C = 1/n Σ (h − h̄)(h − h̄)ᵀ`` of the rows of h [NOTE, sec. 3.2].

    Args:
        h: rows.
        mean: h̄, where it is known.
    """
    centred = h - (h.mean(0) if mean is None else mean)
    return (centred.T @ centred).div_(h.shape[0])


def covariance_inverse(
    h: Float[Tensor, "n d"], damping: float | Tensor, *, centre: bool = True, rank: int | None = None
) -> SymmetricForm:
    r"""``(C + κ I)^{-1}`` with C the covariance of the rows of h; with ``centre=False`` their second moment.

    Args:
        h: rows.
        damping: κ, a number or a 0-d tensor.
        centre: subtract the mean.
        rank: give the form of this rank, at least n; None for the dense form. By the Woodbury identity with X the
            centred rows: ``(I − Xᵀ (X Xᵀ + n κ I)^{-1} X) / κ``.

    Returns:
        the matrix; ``ok`` is False where it is not finite or not definite.
    """
    n, d = h.shape
    X = h - h.mean(0) if centre else h
    kappa = torch.as_tensor(damping, dtype=h.dtype, device=h.device)
    if rank is None:
        value, ok = spd_inverse((X.T @ X).div_(n), kappa)
        return SymmetricForm(value, kappa, h.new_zeros(d, 0), ok)
    gram = X @ X.T
    gram.diagonal().add_(n * kappa)
    L, info = torch.linalg.cholesky_ex(gram)
    basis = h.new_zeros(d, rank)
    basis[:, :n] = torch.linalg.solve_triangular(L, X, upper=False).T / kappa.sqrt()
    ok = (info == 0) & torch.isfinite(basis.sum()) & (kappa > 0)
    return SymmetricForm(None, kappa.reciprocal(), basis, ok)


class InverseRoot(NamedTuple):
    """``U = (C + ε I)^{-1/2}`` and its inverse ``(C + ε I)^{1/2}``."""

    root: SymmetricForm
    inverse: SymmetricForm


def covariance_inverse_root(
    h: Float[Tensor, "n d"], damping: float | Tensor, *, rank: int | None = None, centre: bool = True
) -> InverseRoot:
    r"""``U = (C + ε I)^{-1/2}``, symmetric, with C the covariance of the rows of h [THESIS, sec. 6.5.2].

    ``U C Uᵀ = C (C + ε I)^{-1}``: the identity for ε = 0 and a C of full rank.

    Args:
        h: rows.
        damping: ε, a number or a 0-d tensor.
        rank: give the form of this rank, at least n; None for the dense form.
        centre: subtract the mean.

    Returns:
        U and its inverse. ``ok`` is False where they are not finite, or U would be infinite: without damping and with a
        C that is singular to working precision.
    """
    n, d = h.shape
    X = h - h.mean(0) if centre else h
    eps = torch.as_tensor(damping, dtype=h.dtype, device=h.device)
    if rank is None:
        values, Q, ok = safe_eigh((X.T @ X).div_(n))
        precision = torch.finfo(h.dtype).eps * d
        ok = ok & (values[0] + eps > values[-1] * precision * (eps == 0))
        spectrum = values.clamp(min=0) + eps
        nothing = h.new_zeros(d, 0)
        root, inverse = ((Q * s) @ Q.T for s in (spectrum.rsqrt(), spectrum.sqrt()))
        ok = ok & torch.isfinite(root.sum())
        return InverseRoot(SymmetricForm(root, eps, nothing, ok), SymmetricForm(inverse, eps, nothing, ok))
    values, R, ok = safe_eigh((X @ X.T).div_(n))
    # The eigenvectors of C from those of the Gram matrix; what is rounding there has no direction.
    seen = values > values[-1] * torch.finfo(h.dtype).eps * n
    values = torch.where(seen, values, torch.zeros_like(values))
    Q = (X.T @ R) * torch.where(seen, (values * n).rsqrt(), torch.zeros_like(values))
    ok = ok & (eps > 0) & torch.isfinite(Q.sum())
    spectrum = values + eps
    shrink, grow = h.new_zeros(d, rank), h.new_zeros(d, rank)
    shrink[:, :n] = Q * (eps.rsqrt() - spectrum.rsqrt()).clamp(min=0).sqrt()
    grow[:, :n] = Q * (spectrum.sqrt() - eps.sqrt()).clamp(min=0).sqrt()
    return InverseRoot(SymmetricForm(None, eps.rsqrt(), shrink, ok), SymmetricForm(None, eps.sqrt(), grow, ok, sign=1))
