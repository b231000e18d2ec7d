"""The damped inverses in use: renewed now and then, kept where a factorisation fails."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import Factors
from natgrad.curvature.block_inverse import BlockInverse, FactoredInverse, LowRankInverse, SolvedInverse
from natgrad.curvature.inverse import Eigenbasis, ExactInverse, eigenbasis, invert_block
from natgrad.curvature.running import RunningFactors
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.layers.capture import Record

Tikhonov = ExactTikhonov | FactoredTikhonov


class LayerInverses:
    """Every covered layer's last good inverse.

    Args:
        form: how damping enters. ``ExactTikhonov`` keeps eigenbases: a new damping then needs no new decomposition.

    Attributes:
        failures: how many decompositions failed so far.
        constant: layers whose A is the same at every refresh: an eigenbasis of it, once found, stays.
    """

    constant: Collection[str] = ()

    def __init__(self, form: Tikhonov) -> None:
        self.form = form
        self.failures = 0
        self._kept: dict[str, Eigenbasis | FactoredInverse | LowRankInverse | SolvedInverse] = {}
        self._exact: dict[str, tuple[float, ExactInverse]] = {}

    @property
    def bases(self) -> Mapping[str, Eigenbasis]:
        """Layers whose second moments are wanted in an eigenbasis: none."""
        return {}

    def average(self, estimate: Mapping[str, Factors], weight: Tensor, usable: Tensor) -> None:
        """Take in an estimate's second moments in :attr:`bases`: there are none."""

    def observe(self, estimate: Mapping[str, Factors], running: RunningFactors, usable: Tensor) -> Tensor:
        """Take an estimate into the averages, and its second moments into these inverses; whether it went in."""
        taken = running.update(estimate, usable)
        self.average(estimate, running.weight, taken)
        return taken

    @property
    def pairs(self) -> Mapping[str, str]:
        """Layers that are inverted together with the next one, and the key of the pair: none."""
        return {}

    def order(self, record: Record, z: Tensor) -> Sequence[str]:
        """The layers in forward order, where cross factors of neighbours are wanted: they are not."""
        return ()

    def couple(self, gradients: Mapping[str, Tensor], proposals: Mapping[str, Tensor]) -> None:
        """Add what layers contribute to each other's proposals: nothing."""

    def cross_state(self, name: str, factors: Mapping[str, Factors], like: Tensor) -> dict[str, Tensor]:
        """What a checkpoint needs of the cross factors of a layer and the next one: nothing."""
        return {}

    def save_order(self) -> dict[str, Tensor]:
        """What a checkpoint needs to know of the layers' order: nothing."""
        return {}

    def in_order(self, saved: Mapping[str, Any]) -> "LayerInverses":
        """Inverses of the same layers in the order of a checkpoint."""
        return self

    def renewed(self, factors: Mapping[str, Factors], damping: float | Tensor) -> "LayerInverses":
        """Inverses for another damping beside these, which stay."""
        other = copy.copy(self)
        other._kept, other._exact = dict(self._kept), {}
        other.refresh(factors, damping)
        return other

    def __bool__(self) -> bool:
        return bool(self._kept)

    def refresh(self, factors: Mapping[str, Factors], damping: float | Tensor) -> None:
        """Decompose anew; a layer whose decomposition fails keeps what it had."""
        for name, block in factors.items():
            kept = self._kept.get(name)
            if isinstance(self.form, ExactTikhonov):
                known = kept if name in self.constant and isinstance(kept, Eigenbasis) else None
                new = eigenbasis(block, same_A=known)
            else:
                previous = None if isinstance(kept, Eigenbasis) else kept
                new = invert_block(block, damping, self.form, previous=previous)
            assert isinstance(new, Eigenbasis | FactoredInverse | LowRankInverse)  # for the type checker
            self._keep(name, new)

    def _keep(self, name: str, new: Eigenbasis | FactoredInverse | LowRankInverse | SolvedInverse) -> None:
        """Replace a layer's inverse, unless the new one failed."""
        if bool(new.ok):
            self._kept[name] = new
            self._exact.pop(name, None)
        else:
            self.failures += 1

    def basis(self, name: str) -> Eigenbasis | None:
        """The eigenbasis of a layer that the exact form keeps, or None where there has been no good one yet."""
        kept = self._kept.get(name)
        return kept if isinstance(kept, Eigenbasis) else None

    def get(self, name: str, damping: float) -> BlockInverse | None:
        """The inverse of a layer's damped block, or None where there has been no good one yet.

        Args:
            name: of the layer.
            damping: used at once by the exact form; a factored inverse has that of its last refresh.
        """
        kept = self._kept.get(name)
        if not isinstance(kept, Eigenbasis):
            return kept
        cached = self._exact.get(name)
        if cached is None or cached[0] != damping:
            self._exact[name] = cached = damping, ExactInverse(kept, damping)
        return cached[1]

    def at(self, name: str, damping: float | Tensor) -> BlockInverse | None:
        """As :meth:`get` for a damping that lives on the device: nothing is compared or kept."""
        kept = self._kept.get(name)
        return ExactInverse(kept, damping) if isinstance(kept, Eigenbasis) else kept

    def state(self, name: str, shapes: tuple[Sequence[int], Sequence[int]], like: Tensor) -> dict[str, Tensor]:
        """What a checkpoint needs of one layer; the shapes do not depend on whether there is an inverse yet.

        Args:
            name: of the layer.
            shapes: of A and G; those of one dimension are diagonal by definition and have no basis.
            like: gives dtype and device.
        """
        kept = self._kept.get(name)
        flags = {"inverse_ready": torch.tensor(kept is not None)}
        if isinstance(self.form, ExactTikhonov):
            bases = (kept.QA, kept.QG) if isinstance(kept, Eigenbasis) else (None, None)
            values = (kept.a, kept.g) if isinstance(kept, Eigenbasis) else (None, None)
            for key, basis, value, shape in zip("AG", bases, values, shapes, strict=True):
                flags[f"basis_{key}_known"] = torch.tensor(basis is not None)
                if len(shape) > 1:
                    flags[f"Q{key}"] = like.new_zeros(shape) if basis is None else basis
                rows = shape[:-1] if len(shape) > 1 else shape
                flags[key.lower()] = like.new_zeros(rows) if value is None else value
            return flags
        found = (kept.A, kept.G) if isinstance(kept, FactoredInverse) else [like.new_zeros(shape) for shape in shapes]
        for key, M, shape in zip("AG", found, shapes, strict=True):
            flags[f"inverse_{key}_diagonal"] = torch.tensor(M.ndim == 1)
            flags[f"inverse_{key}"] = torch.diag(M) if M.ndim == 1 < len(shape) else M
        return flags

    def load(self, name: str, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a state whose keys and shapes were checked."""
        self._kept.pop(name, None)
        self._exact.pop(name, None)
        if not bool(state["inverse_ready"]):
            return
        if isinstance(self.form, ExactTikhonov):
            QA, QG = (state[f"Q{x}"].clone() if bool(state[f"basis_{x}_known"]) else None for x in "AG")
            a, g = state["a"].clone(), state["g"].clone()
            self._kept[name] = Eigenbasis(QA, QG, a, g, torch.ones((), dtype=torch.bool, device=a.device))
            return
        A, G = (
            (M.diagonal() if M.ndim == 2 and bool(state[f"inverse_{x}_diagonal"]) else M).clone()
            for x, M in (("A", state["inverse_A"]), ("G", state["inverse_G"]))
        )
        self._kept[name] = FactoredInverse(A, G, torch.ones((), dtype=torch.bool, device=A.device))
