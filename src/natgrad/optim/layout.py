"""One flat buffer for a vector over the parameters, laid out so that each layer's ``[W b]`` is one matrix.

The curvature acts on the joint matrix of a layer, the model on ``W`` and ``b`` apart. Storing a layer as ``[out, in
(+1)]`` gives both as views: nothing is concatenated or copied on the way from the gradient to the update.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.layers.coverage import Coverage
from natgrad.layers.rules import Block
from natgrad.model_view import ModelView


class JointLayout:
    """Where each covered layer's ``[W b]`` and each other parameter lies in a flat vector.

    Args:
        view: the model; its trainable parameters are laid out.
        coverage: the layers whose trainable weight and bias form one block each.

    Attributes:
        segments: the part of each block, and one for all parameters that no block holds.
    """

    def __init__(self, view: ModelView, coverage: Coverage) -> None:
        parameters = view.parameters
        self.view = view
        self.block_slices: dict[str, tuple[slice, tuple[int, ...]]] = {}
        self._blocks = coverage.blocks
        self._others: dict[str, tuple[slice, torch.Size]] = {}
        offset = 0
        for name, block in coverage.blocks.items():
            size = math.prod(block.shape)
            _check_views(block)
            self.block_slices[name] = (slice(offset, offset + size), block.shape)
            offset += size
        covered = {member for block in coverage.blocks.values() for member in block.members.values()}
        for name, parameter in parameters.items():
            if name not in covered:
                self._others[name] = (slice(offset, offset + parameter.numel()), parameter.shape)
                offset += parameter.numel()
        self.size = offset
        wheres = [where for where, _ in self.block_slices.values()]
        rest = slice(wheres[-1].stop if wheres else 0, offset)
        self.segments: list[slice] = [*wheres, rest] if rest.start < rest.stop else wheres
        self.names = tuple(parameters)
        self._kept: dict[int, tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]] = {}

    def empty(self) -> Float[Tensor, " size"]:
        """A vector of undefined numbers in the dtype and on the device of the parameters."""
        first = next(iter(self.view.parameters.values()))
        return torch.empty(self.size, dtype=first.dtype, device=first.device)

    def zeros(self) -> Float[Tensor, " size"]:
        """The same of zeros."""
        return self.empty().zero_()

    def buffers(self, count: int) -> list[Float[Tensor, " size"]]:
        """As :meth:`zeros`, for buffers that live as long as the layout: their views are made once."""
        vectors = [self.zeros() for _ in range(count)]
        for flat in vectors:
            self._kept[id(flat)] = flat, self.blocks(flat), self.parameters(flat)
        return vectors

    def inner_products(self, left: list[Tensor], right: list[Tensor]) -> Float[Tensor, "left right"]:
        """``l · r`` for all pairs of flat vectors, in float64; a pair that occurs twice is multiplied once."""
        pairs = {frozenset((id(x), id(r))): (x, r) for x in left for r in right}
        products = {key: torch.dot(x, r) for key, (x, r) in pairs.items()}
        found = [products[frozenset((id(x), id(r)))] for x in left for r in right]
        return torch.stack(found).view(len(left), len(right)).double()

    def blocks(self, flat: Float[Tensor, " size"]) -> dict[str, Float[Tensor, "*stack out columns"]]:
        """Views of the joint matrices ``[W b]``, by layer."""
        kept = self._kept.get(id(flat))
        if kept is not None and kept[0] is flat:
            return kept[1]
        return {name: flat[where].view(shape) for name, (where, shape) in self.block_slices.items()}

    def parameters(self, flat: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """Views of every parameter's part, by parameter name in the model's order."""
        kept = self._kept.get(id(flat))
        if kept is not None and kept[0] is flat:
            return kept[2]
        views = self.others(flat)
        for name, V in self.blocks(flat).items():
            block = self._blocks[name]
            views |= {block.members[key]: part for key, part in block.from_matrix(V).items()}
        return {name: views[name] for name in self.names}

    def others(self, flat: Float[Tensor, " size"]) -> dict[str, Tensor]:
        """Views of the parameters that no layer block holds."""
        return {name: flat[where].view(shape) for name, (where, shape) in self._others.items()}

    def joint(self, layer: str) -> Float[Tensor, "*stack out columns"]:
        """The present ``[W b]`` of a layer, as a new matrix."""
        block = self._blocks[layer]
        return block.to_matrix({name: p.detach() for name, p in block.parameters.items()}).clone()


def _check_views(block: Block) -> None:
    """Refuse a block whose parameters are no views of its matrix."""
    V = torch.empty(block.shape, device="meta")
    for name, part in block.from_matrix(V).items():
        if not part._is_view():
            raise ValueError(
                f"{block.members[name]}: the rule of {type(block.layer).__name__} copies it out of the block's matrix, "
                "where a view is needed; use natgrad.Preconditioner"
            )
