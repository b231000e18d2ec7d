r"""The covariance of gradients over past batches, discounted, in low-rank form.

.. math:: C_t = \sum_{s \le t} \gamma^{t-s} \hat C_s \Big/ \sum_{s \le t} \gamma^{t-s},

``Ĉ_s`` the covariance of batch s; of the sum before, only the leading eigenvectors are kept (N. Le Roux,
P.-A. Manzagol, Y. Bengio, "Topmoumoute online natural gradient algorithm", NIPS 2007, sec. 3.2). With B the scaled
eigenvectors, ``C_{t−1} ≈ Bᵀ B``, the sum with a new batch is ``Xᵀ X`` for the rows X of B and of the batch, so that
all that is done with it goes through the Gram matrix ``X Xᵀ``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.gradient_covariance import LowRankCovariance
from natgrad.curvature.gradient_rows import GradientRows, TensorRows
from natgrad.linalg.spd import safe_cholesky, safe_eigh


@dataclass(frozen=True)
class PastGradients:
    """What is kept of the gradients of past batches.

    Args:
        rank: at most so many directions, each of the size of the parameters; per block where there are blocks.
        discount: γ, of a batch with each batch that follows.

    Raises:
        ValueError: a setting out of range.
    """

    rank: int = 16
    discount: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1 or not 0 <= self.discount < 1:
            raise ValueError(f"{self}: expected rank >= 1 and 0 <= discount < 1")


class DiscountedCovariance:
    """``C = p Bᵀ B + q Ĉ``: what was kept of past batches, and the covariance of the present one.

    Args:
        past: B ``[rank, P]``; rows of zeros are those that there is no use for yet.
        weight: p, a 0-d tensor; q is 1 − p.
        now: Ĉ.
    """

    def __init__(self, past: Float[Tensor, "rank P"], weight: Float[Tensor, ""], now: LowRankCovariance) -> None:
        self.past, self.now = past, now
        self._scales = weight.sqrt(), ((1 - weight) / len(now.rows)).sqrt()
        self._kept = [_rows_of(past, group) for group in now.groups]
        self._cross = [
            _inner_products(kept, group).to(gram.dtype)
            for kept, group, gram in zip(self._kept, now.groups, now.products, strict=True)
        ]
        self.grams = [self._gram(*one) for one in zip(self._kept, self._cross, now.grams(), strict=True)]

    def trace(self) -> Float[Tensor, ""]:
        """The trace of C."""
        return torch.stack([gram.trace() for gram in self.grams]).sum()

    def inverse(self, damping: Float[Tensor, ""]) -> "DiscountedInverse":
        """``(C + damping I)^{-1}``."""
        return DiscountedInverse(self, damping)

    def leading(self) -> Float[Tensor, "rank P"]:
        """``Q_rᵀ X`` with Q_r the leading eigenvectors of ``X Xᵀ``: the next B, whose ``Bᵀ B`` is nearest to C."""
        rank = len(self.past)
        weights = []
        for gram in self.grams:
            _, vectors, _ = safe_eigh(gram, what="the Gram matrix of the gradients")
            weights.append(vectors[:, -rank:])  # there are at least as many rows as were kept
        old, new = self._scales
        found: dict[str, Tensor] = {}
        for kept, group, Q in zip(self._kept, self.now.groups, weights, strict=True):
            C = Q[rank:] - Q[rank:].mean(0) if self.now.centered else Q[rank:]
            for block in group.blocks:
                found |= block.combine_all((new * C).to(block.dtype))
            for block in kept.blocks:
                for name, part in block.combine_all((old * Q[:rank]).to(block.dtype)).items():
                    found[name] = found[name] + part
        return torch.cat([found[name].reshape(rank, -1) for name in self.now.rows.view.names], 1)

    def project(self, v: Float[Tensor, " P"]) -> list[Float[Tensor, " n"]]:
        """``X v``, per block."""
        directions, (old, new) = self.now.rows.view.to_dict(v), self._scales
        return [
            torch.cat(
                [
                    old * kept.project(directions).to(gram.dtype),
                    new * self.now.center(group.project(directions).to(gram.dtype)),
                ]
            )
            for kept, group, gram in zip(self._kept, self.now.groups, self.grams, strict=True)
        ]

    def combine(self, c: list[Float[Tensor, " n"]]) -> Float[Tensor, " P"]:
        """``Xᵀ c``, c per block."""
        rank, (old, new) = len(self.past), self._scales
        return self.assembled([old * one[:rank] for one in c], [new * self.now.center(one[rank:]) for one in c])

    def assembled(self, old: list[Float[Tensor, " rank"]], new: list[Float[Tensor, " n"]]) -> Float[Tensor, " P"]:
        """``Bᵀ old + Rᵀ new`` with the uncentred gradients R, per block."""
        found: dict[str, Tensor] = {}
        for kept, group, a, b in zip(self._kept, self.now.groups, old, new, strict=True):
            for block in group.blocks:
                found |= block.combine(b.to(block.dtype))
            for block in kept.blocks:
                for name, part in block.combine(a.to(block.dtype)).items():
                    found[name] = found[name] + part
        return self.now.rows.view.to_vector(found)

    def images(self, u: Float[Tensor, " n"]) -> list[Float[Tensor, " n"]]:
        """``X Rᵀ u``, per block: nothing of the size of the parameters is touched."""
        old, new = self._scales
        return [
            torch.cat([old * (cross @ u), new * self.now.center(raw @ u)])
            for cross, raw in zip(self._cross, self.now.products, strict=True)
        ]

    def _gram(self, kept: GradientRows, cross: Tensor, centered: Tensor) -> Float[Tensor, "n n"]:
        """``X Xᵀ`` of a block."""
        old, new = self._scales
        if self.now.centered:
            cross = cross - cross.mean(1, keepdim=True)
        top = torch.cat([old.square() * kept.gram().to(cross.dtype), old * new * cross], 1)
        return torch.cat([top, torch.cat([old * new * cross.T, new.square() * centered], 1)])


class DiscountedInverse:
    """``(C + damping I)^{-1}`` of a `DiscountedCovariance`, by the Woodbury identity.

    Attributes:
        ok: whether the inverse can be used: False where the gradients are not finite.
    """

    def __init__(self, covariance: DiscountedCovariance, damping: Float[Tensor, ""]) -> None:
        self.covariance, self.damping = covariance, damping
        self._roots: list[Tensor] = []
        ok = torch.ones_like(damping, dtype=torch.bool)
        for gram in covariance.grams:
            damped = gram.clone()
            damped.diagonal().add_(damping)
            root, fine = safe_cholesky(damped)
            self._roots.append(root)
            ok = ok & fine
        self.ok = ok

    def of_combination(self, u: Float[Tensor, " n"]) -> Float[Tensor, " P"]:
        """``(C + damping I)^{-1} Rᵀ u`` for the gradients R of the present batch."""
        covariance = self.covariance
        now, (old, new), rank = covariance.now, covariance._scales, len(covariance.past)
        if not now.centered:  # Xᵀ (X Xᵀ + damping I)^{-1} of what X gives Rᵀ u with: nothing cancels
            c = torch.cat([u.new_zeros(rank), u / new])
            return covariance.combine([_solve(root, c) for root in self._roots])
        solved = [_solve(root, image) for root, image in zip(self._roots, covariance.images(u), strict=True)]
        return covariance.assembled(
            [-old * c[:rank] / self.damping for c in solved],
            [(u - new * now.center(c[rank:])) / self.damping for c in solved],
        )

    def __matmul__(self, v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """The product with one vector."""
        covariance = self.covariance
        solved = [_solve(root, c) for root, c in zip(self._roots, covariance.project(v), strict=True)]
        return (v - covariance.combine(solved)) / self.damping


def _rows_of(past: Float[Tensor, "rank P"], group: GradientRows) -> GradientRows:
    """What was kept, for the parameters of a block."""
    view = group.view
    parts = past.split([p.numel() for p in view.parameters.values()], dim=1)
    rows = {name: part.to(p.dtype) for (name, p), part in zip(view.parameters.items(), parts, strict=True)}
    names = [name for block in group.blocks for name in block.names]
    return GradientRows(view, [TensorRows(rows[name], name, view.parameters[name].shape) for name in names])


def _inner_products(kept: GradientRows, group: GradientRows) -> Float[Tensor, "rank n"]:
    """``B Rᵀ`` for the parameters of a block."""
    rows = {b.name: b.rows.reshape(-1, *b.shape) for b in kept.blocks if isinstance(b, TensorRows)}
    return group.project_all(rows)


def _solve(root: Float[Tensor, "n n"], b: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.cholesky_solve(b[:, None], root)[:, 0]
