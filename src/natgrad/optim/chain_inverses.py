"""The block-tridiagonal inverse in use: renewed now and then as a whole, kept as a whole where anything fails."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import Factors
from natgrad.curvature.block_inverse import BlockInverse, FactoredInverse, LowRankInverse
from natgrad.curvature.cores import ChainBlock, Started, carriers, invert_chain
from natgrad.curvature.edges import Canonical, Edge
from natgrad.curvature.pairs import pair_key
from natgrad.damping import FactoredTikhonov
from natgrad.layers.capture import Record
from natgrad.optim.low_rank_inverses import LowRankInverses


class Elsewhere:
    """The inverse of a layer that :meth:`ChainInverses.couple` applies: nothing is left to do.

    Args:
        inverse: that one.
        clear: whether the proposal must be zero before; it is overwritten otherwise.
    """

    def __init__(self, inverse: ChainBlock, *, clear: bool) -> None:
        self.ok = inverse.ok
        self._inverse, self._clear = inverse, clear

    def apply(self, V: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(V)

    def write_negative(self, V: Tensor, into: Tensor) -> None:
        """Zeros, written to a buffer where they matter."""
        if self._clear:
            into.zero_()

    def to_dense(self) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self._inverse.to_dense())


class ChainInverses(LowRankInverses):
    """The last good ``F̂^{-1}``: an inverse per layer and a correction per pair of neighbours.

    Args:
        form: how damping enters, and which factors are taken as low rank plus a diagonal.
        sizes: (out, columns) of every layer by name. Until a forward pass has shown it, their order is taken for that
            of the chain.

    Attributes:
        clipped: how many eigenvalues of the last inverse were raised to working precision.
    """

    def __init__(self, form: FactoredTikhonov, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(form)
        self.rule, self.sizes = form, dict(sizes)
        self.names: tuple[str, ...] = tuple(sizes)
        self.clipped: Tensor | int = 0
        self._ordered = False
        self._edges: dict[str, Edge] = {}
        self._carried: dict[str, str] = {}

    @property
    def pairs(self) -> dict[str, str]:
        """The key of the pair that each layer forms with the next one."""
        return {a: pair_key(a, b) for a, b in zip(self.names[:-1], self.names[1:], strict=True)}

    def order(self, record: Record, z: Tensor) -> Sequence[str]:
        """The layers in forward order; found at the first pass."""
        if not self._ordered:
            self.names, self._ordered = record.chain_order(z), True
        return self.names

    def refresh(self, factors: Mapping[str, Factors], damping: float | Tensor) -> None:
        """Decompose anew; where anything fails all inverses stay: old and new ones do not belong together."""
        new = invert_chain(self.names, factors, damping, self.rule, previous=self._kept)
        if bool(new.ok):
            self._kept, self._edges = {}, new.edges
            self._kept.update(new.blocks)
            self._carried = carriers(self.names, self._kept, self._edges)
            counts = [edge.clipped for edge in new.edges.values()]
            self.clipped = torch.stack(counts).sum() if counts else 0
        else:
            self.failures += 1

    def at(self, name: str, damping: float | Tensor) -> BlockInverse | None:
        """As in the base class; of a layer whose inverse :meth:`couple` applies along, none of it."""
        kept = self._kept.get(name)
        if isinstance(kept, LowRankInverse) or (isinstance(kept, FactoredInverse) and name in self._carried):
            return Elsewhere(kept, clear=isinstance(kept, FactoredInverse))
        return kept if isinstance(kept, FactoredInverse) else None

    def couple(self, gradients: Mapping[str, Tensor], proposals: Mapping[str, Tensor]) -> None:
        """Add what neighbours contribute to proposals that are there already, ``−F̆^{-1} ∇h`` by :meth:`at`.

        Args:
            gradients: by layer name.
            proposals: likewise; changed in place.
        """
        started = {
            name: Started(kept, gradients[name], proposals[name])
            for name, kept in self._kept.items()
            if isinstance(kept, LowRankInverse)
        }
        cores = {name: started[name].core if name in started else gradients[name] for name in self.names}
        added = {name: started[name].added if name in started else proposals[name] for name in self.names}
        for pair in zip(self.names[:-1], self.names[1:], strict=True):
            key = pair_key(*pair)
            edge = self._edges.get(key)
            if edge is not None:
                whole = edge.whole is not None and self._carried.get(pair[edge.whole]) == key
                edge.subtract([cores[n] for n in pair], [added[n] for n in pair], whole=whole)
        for layer in started.values():
            layer.finish()

    def state(self, name: str, shapes: tuple[Sequence[int], Sequence[int]], like: Tensor) -> dict[str, Tensor]:
        """What a checkpoint needs of one layer, and of its pair with the next."""
        state = super().state(name, shapes, like)
        edge = self._edges.get(self.pairs.get(name, ""))
        for key, shape in self._pair_shapes(name).items():
            if edge is not None:
                c: Canonical = getattr(edge, key)
                state |= {f"edge_{key}_X": c.X, f"edge_{key}_Y": c.Y, f"edge_{key}_squares": c.squares}
            else:
                lower, upper = (self.solver.rank if self._low((n, n)) else n for n in shape)  # of the cores
                r = min(lower, upper)
                state |= {f"edge_{key}_X": like.new_zeros(lower, r), f"edge_{key}_Y": like.new_zeros(upper, r)}
                state[f"edge_{key}_squares"] = like.new_zeros(r)
        return state

    def load(self, name: str, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`, on a state whose keys and shapes were checked."""
        super().load(name, state)
        pair = self.pairs.get(name)
        if pair is None:
            return
        self._edges.pop(pair, None)
        if name in self._kept:
            A, G = (Canonical(*(state[f"edge_{key}_{part}"].clone() for part in ("X", "Y", "squares"))) for key in "AG")
            self._edges[pair] = Edge(A, G)
        self._carried = carriers(self.names, self._kept, self._edges)

    def save_order(self) -> dict[str, Tensor]:
        """The chain's layers as numbers in the order of the modules."""
        layers = list(self.sizes)
        return {"order": torch.tensor([layers.index(name) for name in self.names])}

    def in_order(self, saved: Mapping[str, Any]) -> "ChainInverses":
        """New inverses of the same layers in the order of a checkpoint.

        Raises:
            ValueError: there is no order, or it is that of other layers.
        """
        layers, order = list(self.sizes), saved.get("order")
        if not isinstance(order, Tensor) or sorted(order.tolist()) != list(range(len(layers))):
            raise ValueError(
                f"state_dict: order is {order!r}; expected a permutation of the {len(layers)} layers: it is the state "
                "of another structure or another model"
            )
        other = ChainInverses(self.rule, self.sizes)
        other.names, other._ordered = tuple(layers[i] for i in order.tolist()), bool(saved["update"])
        return other

    def cross_state(self, name: str, factors: Mapping[str, Factors], like: Tensor) -> dict[str, Tensor]:
        """The averaged cross factors of a layer and the next one."""
        found = factors.get(self.pairs.get(name, ""))
        return {
            f"cross_{key}": like.new_zeros(shape) if found is None else getattr(found, key)
            for key, shape in self._pair_shapes(name).items()
        }

    def _pair_shapes(self, name: str) -> dict[str, tuple[int, int]]:
        """(lower, upper) sizes of the factors A and G of the pair that a layer leads; nothing for the last layer."""
        if name not in self.pairs:
            return {}
        out, columns = self.sizes[name]
        next_out, next_columns = self.sizes[self.names[self.names.index(name) + 1]]
        return {"A": (columns, next_columns), "G": (out, next_out)}
