r"""What a layer's block of the curvature is: one rule per kind of layer.

A block covers those parameters of a layer that are trained, as one matrix V, and approximates the curvature in it by
``A ⊗ G``, which acts as ``G V A``. A :class:`LayerRule` says how parameters become V and back, and how what went into
the layer (a) and the derivatives of what came out (g) become the sums behind A and G.

Two families: a :class:`KroneckerRule` for layers that are linear in their parameters, ``s = W ā`` at every position of
an example, and a :class:`DiagonalRule` for those whose block is a diagonal matrix.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.layers.factors import flatten_rows, joint_moment, second_moment

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Args:
        layer: the module that was called; the block's own, or one that shares all of its parameters.
        input: its first argument.
        output_shape: of what it returned.
        training: whether it was in training mode.
        slot: for a stack of blocks: which of them the call belongs to; None for all.
        arrange: brings the output's derivatives into the order of ``input`` (examples first); None where they have it.
        share: of the examples that are asked for in the rows of ``input``, where they cannot be told apart.
        every: sums over inputs are made of every so many positions of an example, and count as many times.
        phase: the first of them.
        whole: the input of the whole batch, where ``input`` is that of its first examples.
    """

    layer: Any
    input: Tensor
    output_shape: torch.Size
    training: bool = True
    slot: slice | None = None
    arrange: Callable[[Tensor], Tensor] | None = None
    share: float = 1.0
    every: int = 1
    phase: int = 0
    whole: Tensor | None = None

    def thinned(self, rows: Tensor, dim: int = 1) -> tuple[Tensor, int]:
        """The positions that sums over inputs are made of, and how often each of them counts.

        Averaged over all phases such a sum is that over all positions.

        Args:
            rows: what is at the positions.
            dim: the dimension of the positions.
        """
        step = max(1, min(self.every, rows.shape[dim]))
        if step == 1:
            return rows, 1
        index = [slice(None)] * (dim % rows.ndim) + [slice(self.phase % step, None, step)]
        return rows[tuple(index)], step

    def gradient(self, g: Tensor) -> Tensor:
        """The derivatives of the output in the order of ``input``."""
        return g if self.arrange is None else self.arrange(g)


@dataclass(frozen=True)
class Block:
    """A rule bound to a layer: one block of the curvature.

    Args:
        name: clean name of the layer (or of the parameter).
        rule: of the layer's kind.
        modules: the layer; further ones where several share all of their parameters.
        members: attribute name in the layer → parameter name, of the trained ones, in the order of V's columns.
        sharing: how the positions of an example count, ``"expand"`` or ``"reduce"``.
    """

    name: str
    rule: "LayerRule"
    modules: tuple[Any, ...]
    members: Mapping[str, str]
    sharing: Sharing = "expand"

    @property
    def layer(self) -> Any:
        """The layer."""
        return self.modules[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of V: (out, columns), with a stack of blocks (blocks, out, columns)."""
        return self.rule.shape(self.layer, tuple(self.members))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Attribute name → parameter, of the trained ones."""
        return {name: p for name, p in self.rule.parameters(self.layer).items() if name in self.members}

    @property
    def dtype(self) -> torch.dtype:
        """That of sums over many rows: single precision at least."""
        return torch.promote_types(next(iter(self.parameters.values())).dtype, torch.float32)

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G; one dimension for a factor that is diagonal by definition."""
        *stack, out, columns = self.shape
        A = (columns,) if self.rule.diagonal_input else (*stack, columns, columns)
        return A, (out,) if self.rule.diagonal_output else (*stack, out, out)

    @property
    def trained(self) -> tuple[str, ...]:
        """The attribute names of the parameters that require a gradient now."""
        return tuple(name for name, p in self.rule.parameters(self.layer).items() if p.requires_grad)

    def to_matrix(self, parts: Mapping[str, Tensor]) -> Tensor:
        """V from tensors shaped like the parameters, by attribute name."""
        return self.rule.to_matrix(self.layer, parts)

    def from_matrix(self, V: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`to_matrix`; views of V where they can be."""
        return self.rule.from_matrix(self.layer, V, tuple(self.members))

    def describe(self) -> str:
        """One line for a table."""
        return self.rule.describe(self)


class LayerRule(ABC):
    """How one kind of layer is covered. Rules hold no state: one object serves all layers of a kind.

    Attributes:
        attributes: names of the parameters that belong to the block, in the order of V's columns.
        structures: the structures of curvature that can use the rule.
        diagonal_input: A is diagonal by definition and kept as a vector.
        diagonal_output: so is G.
        shares: whether the layer may act at several positions of an example (``sharing`` matters).
        captured: whether a hook on the layer sees what goes in and comes out.
        interceptor: where it does not, what sees it inside of the layer's forward pass; of one kind per layer.
        features_last: every dimension of the input but the last ones is one of examples or positions, in any order.
    """

    attributes: tuple[str, ...] = ("weight", "bias")
    structures: tuple[str, ...] = ("block_diagonal", "ekfac")
    diagonal_input = False
    diagonal_output = False
    shares = True
    captured = True
    interceptor: Any = None
    features_last = False

    @property
    def by_hand(self) -> bool:
        """Whether the layer is ``W a + b`` and the block holds both: gradients may be formed from (a, g) without it."""
        return False

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """The layer's parameters that the block may hold, by attribute name."""
        found = {name: layer._parameters.get(name) for name in self.attributes}
        return {name: p for name, p in found.items() if p is not None}

    def structures_of(self, layer: Any) -> tuple[str, ...]:
        """The structures that can use the rule for this layer."""
        return self.structures

    def refuse(self, layer: Any) -> str | None:
        """Why this layer cannot be covered, for a message; None where it can."""
        return None

    @abstractmethod
    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(out, columns) of V for the trained parameters of these names."""

    @abstractmethod
    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """V from tensors shaped like the parameters, by attribute name."""

    @abstractmethod
    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The inverse of :meth:`to_matrix`, as views of V where they can be."""

    @abstractmethod
    def describe(self, block: Block) -> str:
        """One line for a table of what is treated how."""


class KroneckerRule(LayerRule):
    r"""A layer that is linear in its parameters: at every position ``s = W ā``, with ``ā = [a 1]`` for a bias.

    A rule for a kind of your own says which rows there are: :meth:`rows` and :meth:`gradient_rows`; everything else
    follows. By default V is ``[W b]`` with W flattened to ``[out, in]``.

    "expand" takes every position as a use: ``A = Σ ā āᵀ``, ``G`` the mean of ``g gᵀ`` over positions. "reduce" takes
    one row per example, the mean of ā over positions and the sum of g (Eschenhagen et al. 2023, sec. 3).
    """

    @abstractmethod
    def rows(self, use: Use) -> Float[Tensor, "examples positions in"]:
        """What is multiplied by W, without the homogeneous 1."""

    @abstractmethod
    def gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "examples positions out"]:
        """The derivatives of ``W ā``, rows parallel to :meth:`rows`."""

    def stacked_rows(self, use: Use) -> Float[Tensor, "stack examples positions in"]:
        """:meth:`rows` of every block of a stack; zero where a call does not belong to it."""
        return self.rows(use)[None]

    def stacked_gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "stack examples positions out"]:
        """:meth:`gradient_rows` of every block of a stack."""
        return self.gradient_rows(use, g)[None]

    def input_sum(self, block: Block, use: Use) -> tuple[Tensor, float | Tensor]:
        """``Σ ā āᵀ`` over the rows of one call, and the number of rows."""
        a = self.rows(use)
        rows, times = float(a.shape[0] * a.shape[1]), 1
        if block.sharing == "reduce":
            a, rows = a.mean(1), float(a.shape[0])
        else:
            a, times = use.thinned(a)
        a = flatten_rows(a).to(block.dtype)
        moment = joint_moment(second_moment(a), a.sum(0), a.shape[0], *_parts(block))
        return moment if times == 1 else moment.mul_(times), rows

    def output_sum(self, block: Block, use: Use, g: Tensor, total: Tensor) -> None:
        """Add ``Σ g gᵀ`` over the rows of one call to ``total``."""
        g = self.gradient_rows(use, g).to(total.dtype)
        second_moment(g.sum(1) if block.sharing == "reduce" else flatten_rows(g), out=total)

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(out, columns) of ``[W b]``."""
        weight = layer.weight
        return weight.shape[0], ("weight" in names) * weight.shape[1:].numel() + ("bias" in names)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``[W b]``."""
        columns = [part.flatten(1) if name == "weight" else part.unsqueeze(1) for name, part in parts.items()]
        return torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W and b, views of V."""
        parts = {}
        if "weight" in names:
            shape = layer.weight.shape
            parts["weight"] = V.narrow(1, 0, shape[1:].numel()).view(shape)
        if "bias" in names:
            parts["bias"] = V.select(1, V.shape[1] - 1)
        return parts

    def describe(self, block: Block) -> str:
        """Kronecker, columns x out."""
        *stack, out, columns = block.shape
        times = f"{stack[0]} of " if stack else ""
        shared = ", reduce" if block.sharing == "reduce" else ""
        return f"Kronecker {times}{columns} x {out}{shared}"


class DiagonalRule(LayerRule):
    r"""A layer whose block is the diagonal of its exact curvature: ``Σ (per-example gradient)²``.

    V is one row: all trained parameters one after the other; A is that diagonal and G a number.
    """

    diagonal_input = True
    diagonal_output = True
    shares = False

    @abstractmethod
    def per_example(self, block: Block, use: Use, g: Tensor) -> Float[Tensor, "examples columns"]:
        """Each example's gradient in the parameters of V, from one call of the layer.

        Dimension 0 of the input is that of the examples.
        """

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(1, number of elements)."""
        parameters = self.parameters(layer)
        return 1, sum(parameters[name].numel() for name in names)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """All elements as one row."""
        rows = [part.reshape(1, -1) for part in parts.values()]
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The inverse, as views."""
        parameters, row, start, parts = self.parameters(layer), V.select(0, 0), 0, {}
        for name in names:
            shape = parameters[name].shape
            parts[name] = row.narrow(0, start, shape.numel()).view(shape)
            start += shape.numel()
        return parts

    def describe(self, block: Block) -> str:
        """Diagonal, and of what."""
        return f"diagonal ({type(block.layer).__name__})"


def of_weight_alone(rule: KroneckerRule) -> KroneckerRule:
    """The same rule for the weight without the bias: of layers that share the one and not the other.

    Args:
        rule: with the attributes weight and bias.
    """
    other = copy.copy(rule)
    other.attributes = ("weight",)
    return other


def check_sharing(sharing: Any) -> None:
    """Refuse an unknown word.

    Raises:
        ValueError: neither ``"expand"`` nor ``"reduce"``.
    """
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing={sharing!r}: expected 'expand' or 'reduce'")


def _parts(block: Block) -> tuple[bool, bool]:
    return "weight" in block.members, "bias" in block.members
