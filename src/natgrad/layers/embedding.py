"""``nn.Embedding``: a linear layer on one-hot vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from natgrad.layers.factors import flatten_rows, second_moment
from natgrad.layers.rules import Block, KroneckerRule, Use


class EmbeddingRule(KroneckerRule):
    r"""``s = Wᵀ e`` for the one-hot e of every index; V is ``Wᵀ``, ``[dim, vocabulary]``.

    ``A = 1/N Σ e eᵀ`` is diagonal, the counts of the indices, and never written out. Indices equal to ``padding_idx``
    are no rows: the weight has no gradient from them. Positions always count by themselves (``"expand"``): with
    ``"reduce"`` A would be a full matrix.
    """

    attributes = ("weight",)
    diagonal_input = True
    shares = False

    def refuse(self, layer: Any) -> str | None:
        """Options that change the weight or its gradient on the way."""
        if layer.max_norm is not None:
            return "with max_norm, which changes its weight in the forward pass"
        if layer.scale_grad_by_freq:
            return "with scale_grad_by_freq, whose gradient is not that of the loss"
        if layer.sparse:
            return "with sparse=True, whose gradient has no matrix"
        return None

    def indices(self, use: Use) -> Int[Tensor, "examples positions"]:
        """The indices of every example."""
        return use.input.reshape(use.input.shape[0], -1) if use.input.ndim else use.input.reshape(1, 1)

    def rows(self, use: Use) -> Float[Tensor, "examples positions in"]:
        """One-hot vectors (zero for padding), written out: small vocabularies only."""
        ids = self.indices(use)
        return torch.nn.functional.one_hot(ids, use.layer.num_embeddings) * self._kept(use, ids)[..., None]

    def gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "examples positions out"]:
        """The derivatives, zero for padding."""
        ids = self.indices(use)
        return use.gradient(g).reshape(*ids.shape, -1) * self._kept(use, ids)[..., None]

    def input_sum(self, block: Block, use: Use) -> tuple[Tensor, float | Tensor]:
        """The counts of the indices, and their number."""
        ids, layer = use.input.reshape(-1), use.layer
        counts = torch.zeros(layer.num_embeddings, dtype=block.dtype, device=ids.device)
        counts.index_add_(0, ids, counts.new_ones(()).expand(ids.shape[0]))
        if layer.padding_idx is None:
            return counts, float(ids.numel())
        counts[layer.padding_idx] = 0
        return counts, counts.sum()

    def output_sum(self, block: Block, use: Use, g: Tensor, total: Tensor) -> None:
        """Add ``Σ g gᵀ`` over the indices that are no padding."""
        g = flatten_rows(use.gradient(g)).to(total.dtype)
        if use.layer.padding_idx is not None:
            g = g * self._kept(use, use.input.reshape(-1))[:, None]
        second_moment(g, out=total)

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(dim, vocabulary)."""
        return layer.embedding_dim, layer.num_embeddings

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``Wᵀ``."""
        return parts["weight"].T

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W."""
        return {"weight": V.T}

    def describe(self, block: Block) -> str:
        """Kronecker with a diagonal A."""
        out, columns = block.shape
        return f"Kronecker {columns} (diagonal) x {out}"

    def _kept(self, use: Use, ids: Tensor) -> Tensor:
        padding = use.layer.padding_idx
        return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
