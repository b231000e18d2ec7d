"""Eigenbases of wide factors of which the leading eigenvectors alone are found, each from the ones before."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, to_dense
from natgrad.curvature.gram import Gram
from natgrad.curvature.inverse import Eigenbasis, FactorBasis, factor_basis
from natgrad.damping import ExactTikhonov
from natgrad.linalg.low_rank import LowRank, leading_subspace
from natgrad.linalg.reflectors import Reflectors
from natgrad.optim.inverses import LayerInverses


class LeadingBases(LayerInverses):
    """As :class:`LayerInverses` with exact damping, with a basis of wide factors as :class:`Reflectors`.

    Its first columns are about the leading eigenvectors, by a step of subspace iteration from those of the refresh
    before; the others stay as near to the unit vectors as they can. An orthogonal basis in any case.

    Args:
        solver: how many eigenvectors, and by how many steps.
    """

    def __init__(self, solver: LowRank) -> None:
        super().__init__(ExactTikhonov())
        self.solver = solver

    def refresh(self, factors: Mapping[str, Factors], damping: float | Tensor = 0.0) -> None:
        """Find bases anew; a layer where that fails keeps what it had."""
        for name, block in factors.items():
            kept = self.basis(name)
            if kept is not None and name in self.constant:
                QA, a, ok_a = kept.QA, kept.a, kept.ok
            else:
                QA, a, ok_a = self._renewed(block.A, None if kept is None else kept.QA)
            QG, g, ok_g = self._renewed(block.G, None if kept is None else kept.QG)
            new = Eigenbasis(QA, QG, a, g, ok_a & ok_g)
            if bool(new.ok):
                self._kept[name] = new
            else:
                self.failures += 1

    def _renewed(self, M: Tensor | Diagonal | Gram, kept: Tensor | Reflectors | None) -> FactorBasis:
        if isinstance(M, Diagonal) or not self._wide(M.shape):
            return factor_basis(M)
        return leading_basis(to_dense(M), self.solver, kept)

    def _wide(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and self.solver.applies(shape[0])

    def state(self, name: str, shapes: tuple[Sequence[int], Sequence[int]], like: Tensor) -> dict[str, Tensor]:
        """As :meth:`LayerInverses.state`; reflections in the place of a wide factor's eigenvectors."""
        kept = self.basis(name)
        state = {"inverse_ready": torch.tensor(kept is not None)}
        for key, shape in zip("AG", shapes, strict=True):
            Q = None if kept is None else getattr(kept, f"Q{key}")
            state[f"basis_{key}_known"] = torch.tensor(Q is not None)
            for part, size in self._parts(key, shape).items():
                found = getattr(Q, part[3:]) if isinstance(Q, Reflectors) else Q
                state[part] = like.new_zeros(size) if found is None else found
            rows = shape[:-1] if len(shape) > 1 else shape
            state[key.lower()] = like.new_zeros(rows) if kept is None else getattr(kept, key.lower())
        return state

    def load(self, name: str, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a state whose keys and shapes were checked."""
        self._kept.pop(name, None)
        if not bool(state["inverse_ready"]):
            return
        bases = []
        for key in "AG":
            known, parts = bool(state[f"basis_{key}_known"]), [f"Q{key}_Y", f"Q{key}_YT"]
            if known and f"Q{key}" in state:
                bases.append(state[f"Q{key}"].clone())
            else:
                bases.append(Reflectors(*(state[part].clone() for part in parts)) if known else None)
        a, g = state["a"].clone(), state["g"].clone()
        self._kept[name] = Eigenbasis(bases[0], bases[1], a, g, torch.ones((), dtype=torch.bool, device=a.device))

    def _parts(self, key: str, shape: Sequence[int]) -> dict[str, Sequence[int]]:
        """The names and shapes of what a checkpoint holds of a basis; nothing of a diagonal factor's."""
        if self._wide(shape):
            return {f"Q{key}_{part}": (shape[0], self.solver.rank) for part in ("Y", "YT")}
        return {f"Q{key}": shape} if len(shape) > 1 else {}


def leading_basis(
    M: Float[Tensor, "n n"], solver: LowRank, start: Tensor | Reflectors | None = None
) -> tuple[Reflectors, Float[Tensor, " n"], Bool[Tensor, ""]]:
    """An orthogonal basis that begins with leading eigenvectors, the diagonal of M in it, and whether both can be used.

    Args:
        M: symmetric positive semi-definite.
        solver: how many, and by how many steps.
        start: such a basis of an earlier M.
    """
    U, _ = leading_subspace(M, solver.rank, solver.steps, start.leading() if isinstance(start, Reflectors) else None)
    Q = Reflectors.beginning_with(U)
    values = Q.diagonal_of(M).clamp(min=0)
    return Q, values, torch.isfinite(values).all() & torch.isfinite(Q.YT).all()
