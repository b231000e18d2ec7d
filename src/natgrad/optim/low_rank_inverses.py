"""Inverses of factors as low rank plus a diagonal, each found from the one before it [KFAC, sec. 8]."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.block_inverse import LowRankInverse, inverse_of
from natgrad.damping import FactoredTikhonov
from natgrad.linalg.low_rank import DiagonalMinusLowRank, LowRank
from natgrad.optim.inverses import LayerInverses


class LowRankInverses(LayerInverses):
    """As :class:`LayerInverses`, for ``FactoredTikhonov(solver=LowRank(...))``; what differs is the checkpoint."""

    def __init__(self, form: FactoredTikhonov) -> None:
        super().__init__(form)
        self.solver = form.solver if isinstance(form.solver, LowRank) else LowRank(sys.maxsize)

    def state(self, name: str, shapes: tuple[Sequence[int], Sequence[int]], like: Tensor) -> dict[str, Tensor]:
        """As :meth:`LayerInverses.state`; a factor of low rank is kept as a diagonal and a matrix of that rank."""
        kept = self._kept.get(name)
        state = super().state(name, shapes, like)
        for key, shape in zip("AG", shapes, strict=True):
            if not self._low(shape):
                if isinstance(kept, LowRankInverse):
                    M = getattr(kept, key)
                    state[f"inverse_{key}_diagonal"] = torch.tensor(M.ndim == 1)
                    state[f"inverse_{key}"] = torch.diag(M) if M.ndim == 1 < len(shape) else M
                continue
            state.pop(f"inverse_{key}")
            found = getattr(kept, key) if isinstance(kept, LowRankInverse) else like.new_zeros(shape[0])
            plain = isinstance(found, Tensor)  # a diagonal factor
            state[f"inverse_{key}_diagonal"] = torch.tensor(plain)
            state[f"inverse_{key}_d"] = found if plain else found.d
            state[f"inverse_{key}_W"] = like.new_zeros(shape[0], self.solver.rank) if plain else found.W
        return state

    def load(self, name: str, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a state whose keys and shapes were checked."""
        self._kept.pop(name, None)
        if not bool(state["inverse_ready"]):
            return
        A, G = (self._loaded(state, key) for key in "AG")
        ok = torch.ones((), dtype=torch.bool, device=state["inverse_ready"].device)
        self._kept[name] = inverse_of(A, G, ok)

    def _low(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and self.solver.applies(shape[0])

    @staticmethod
    def _loaded(state: Mapping[str, Tensor], key: str) -> Tensor | DiagonalMinusLowRank:
        diagonal = bool(state[f"inverse_{key}_diagonal"])
        if f"inverse_{key}_d" in state:
            d, W = state[f"inverse_{key}_d"].clone(), state[f"inverse_{key}_W"].clone()
            return d if diagonal else DiagonalMinusLowRank(d, W)
        M = state[f"inverse_{key}"]
        return (M.diagonal() if M.ndim == 2 and diagonal else M).clone()
