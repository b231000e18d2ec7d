"""EKFAC's inverses: eigenbases that are renewed now and then, second moments that follow every estimate."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import Factors
from natgrad.curvature.ekfac import carried_over, eigenvalues
from natgrad.curvature.inverse import Eigenbasis, ExactInverse, eigenbasis
from natgrad.damping import ExactTikhonov
from natgrad.optim.inverses import LayerInverses
from natgrad.optim.select import reads_for_free


class ScaledInverses(LayerInverses):
    r"""``Q_G [ (Q_Gᵀ V Q_A) / (S + damping) ] Q_Aᵀ`` with S as in :mod:`natgrad.curvature.ekfac`, per layer.

    S starts as ``g aᵀ``, the eigenvalues of the Kronecker product, and takes in the second moments of every estimate
    in the basis of its time. A new basis keeps what was learnt: S becomes the diagonal, in the new basis, of the
    approximation made in the old one.

    Args:
        diagonal: the layers whose block is diagonal by definition: their S is ``g aᵀ`` at every renewal.

    Attributes:
        scalings: S of every layer that has a basis.
    """

    def __init__(self, diagonal: Collection[str] = ()) -> None:
        super().__init__(ExactTikhonov())
        self._diagonal = frozenset(diagonal)
        self.scalings: dict[str, Float[Tensor, "*stack out columns"]] = {}

    @property
    def bases(self) -> dict[str, Eigenbasis]:
        """The bases in which the next estimate's second moments are wanted."""
        return {name: kept for name, kept in self._kept.items() if isinstance(kept, Eigenbasis)}

    def average(self, estimate: Mapping[str, Factors], weight: Float[Tensor, ""], usable: Tensor) -> None:
        """``S ← (1 − weight) S + weight S_new`` for the layers that the estimate has second moments of.

        Args:
            estimate: by layer name, in the present bases.
            weight: ``1 − ε``.
            usable: False leaves S as it is; so do second moments that are not finite.
        """
        found = {name: factors.S for name, factors in estimate.items() if factors.S is not None}
        if not found or (reads_for_free(usable) and not usable):
            return
        names, new = list(found), list(found.values())
        usable = usable & torch.isfinite(torch.stack([S.sum() for S in new])).all()
        old = [self.scalings[name] for name in names]
        new = [torch.where(usable, S, S_old) for S, S_old in zip(new, old, strict=True)]
        torch._foreach_lerp_(old, new, [weight.to(S.dtype) for S in old])
        self._exact.clear()

    def refresh(self, factors: Mapping[str, Factors], damping: float | Tensor) -> None:
        """New bases; a layer whose decomposition fails keeps what it had."""
        for name, block in factors.items():
            new, old = eigenbasis(block), self._kept.get(name)
            if not bool(new.ok):
                self.failures += 1
                continue
            known = isinstance(old, Eigenbasis) and name in self.scalings and name not in self._diagonal
            S = carried_over(self.scalings[name], old, new) if known else eigenvalues(new)
            self._kept[name], self.scalings[name] = new, S
            self._exact.pop(name, None)

    def get(self, name: str, damping: float) -> ExactInverse | None:
        """The inverse of a layer's damped block, or None where there has been no good basis yet."""
        cached = self._exact.get(name)
        if cached is not None and cached[0] == damping:
            return cached[1]
        inverse = self.at(name, damping)
        if inverse is not None:
            self._exact[name] = damping, inverse
        return inverse

    def at(self, name: str, damping: float | Tensor) -> ExactInverse | None:
        """As :meth:`get` for a damping that lives on the device: nothing is compared or kept."""
        kept = self._kept.get(name)
        return ExactInverse(kept, damping, self.scalings[name]) if isinstance(kept, Eigenbasis) else None

    def state(self, name: str, shapes: tuple[Sequence[int], Sequence[int]], like: Tensor) -> dict[str, Tensor]:
        """What a checkpoint needs of one layer; the shapes do not depend on whether there is a basis yet."""
        S, (of_a, of_g) = self.scalings.get(name), shapes
        shape = (*of_g[:-2], of_g[-1], of_a[-1])
        return super().state(name, shapes, like) | {"S": like.new_zeros(shape) if S is None else S}

    def load(self, name: str, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a state whose keys and shapes were checked."""
        super().load(name, state)
        self.scalings.pop(name, None)
        if name in self._kept:
            self.scalings[name] = state["S"].clone()
