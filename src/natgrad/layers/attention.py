r"""The projections inside ``nn.MultiheadAttention``, which the module uses without calling a layer.

Two blocks: ``NAME.in_proj``, a stack of the three projections of query, key and value, and ``NAME.out_proj``. With
``kdim`` or ``vdim`` the three have shapes of their own and are three blocks, of their weights alone: torch keeps their
biases in one parameter. What goes into them and comes out is seen by running torch's own attention function with a
``linear`` that keeps record, in recorded passes alone.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.layers.factors import flatten_rows, input_moment, second_moment
from natgrad.layers.linear import LinearRule
from natgrad.layers.rules import Block, KroneckerRule, LayerRule, Use

# The projections of other widths than the module's, as torch calls them.
_SEPARATE = ("q_proj", "k_proj", "v_proj")
# (which projection: "in_proj", "out_proj" or one of the above, input, output, slot, arrange)
Seen = Callable[[str, Tensor, Tensor, slice | None, Callable[[Tensor], Tensor]], None]


class Interceptor(TorchFunctionMode):
    """Runs ``nn.MultiheadAttention``'s function and reports the inputs and outputs of its projections.

    Args:
        layer: the module whose forward pass runs inside.
        seen: called for every projection.
    """

    def __init__(self, layer: nn.MultiheadAttention, seen: Seen) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything pass but the attention function."""
        if func is F.multi_head_attention_forward:
            return _attention_with(self._linear(args[0]), args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _linear(self, query: Tensor) -> Callable[..., Tensor]:
        layer, seen = self.layer, self.seen
        examples = query.shape[1] if query.ndim == 3 else 1

        def arrange(x: Tensor) -> Tensor:
            """[positions, examples, d], or both flattened, with the examples first."""
            return x.reshape(-1, examples, x.shape[-1]).transpose(0, 1)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = F.linear(x, weight, bias)
            if weight is layer.out_proj.weight:
                seen("out_proj", arrange(x), out, None, arrange)
            elif layer.in_proj_weight is not None:
                first = weight.storage_offset() - layer.in_proj_weight.storage_offset()
                start = first // layer.in_proj_weight.stride(0) // layer.embed_dim
                seen("in_proj", arrange(x), out, slice(start, start + len(weight) // layer.embed_dim), arrange)
            else:
                which = next(name for name in _SEPARATE if weight is getattr(layer, f"{name}_weight"))
                seen(which, arrange(x), out, None, arrange)
            return out

        return linear


class OutProjectionRule(LinearRule):
    """``out_proj``, a linear layer that is never called."""

    structures = KroneckerRule.structures
    captured = False
    interceptor = Interceptor
    features_last = False

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """Weight and bias of ``out_proj``."""
        return super().parameters(layer.out_proj)

    def shape(self, layer: Any, names: Any) -> tuple[int, ...]:
        """(out, in (+1))."""
        return super().shape(layer.out_proj, names)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``[W b]``."""
        return super().to_matrix(layer.out_proj, parts)

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W and b."""
        return super().from_matrix(layer.out_proj, V, names)


class InProjectionRule(KroneckerRule):
    """The projections of query, key and value: a stack of three blocks, each with its own A and G."""

    attributes = ("in_proj_weight", "in_proj_bias")
    captured = False
    interceptor = Interceptor

    def rows(self, use: Use) -> Float[Tensor, "examples positions in"]:
        """The input, examples first."""
        return use.input.reshape(use.input.shape[0], -1, use.input.shape[-1])

    def gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "examples positions out"]:
        """The derivatives of the projections that the call made, side by side."""
        g = use.gradient(g)
        return g.reshape(g.shape[0], -1, g.shape[-1])

    def stacked_rows(self, use: Use) -> Float[Tensor, "3 examples positions in"]:
        """The input, for the projections that the call made."""
        a = self.rows(use)
        stacked = a.new_zeros(3, *a.shape)
        stacked[use.slot] = a
        return stacked

    def stacked_gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "3 examples positions out"]:
        """The derivatives of the projections that the call made."""
        g = self.gradient_rows(use, g).unflatten(2, (-1, use.layer.embed_dim)).movedim(2, 0)
        stacked = g.new_zeros(3, *g.shape[1:])
        stacked[use.slot] = g
        return stacked

    def input_sum(self, block: Block, use: Use) -> tuple[Tensor, Tensor]:
        """``Σ ā āᵀ`` for the projections of the call, zero for the others; and the numbers of rows."""
        weight, bias = "in_proj_weight" in block.members, "in_proj_bias" in block.members
        a = self.rows(use).to(block.dtype)
        count, times = float(a.shape[0] * a.shape[1]), 1
        if block.sharing == "reduce":
            a, count = a.mean(1), float(a.shape[0])
        else:
            a, times = use.thinned(a)
        moment = input_moment(flatten_rows(a), weight, bias)
        total, rows = a.new_zeros(3, *moment.shape), a.new_zeros(3, 1, 1)
        total[use.slot], rows[use.slot] = moment if times == 1 else moment.mul_(times), count
        return total, rows

    def output_sum(self, block: Block, use: Use, g: Tensor, total: Tensor) -> None:
        """Add ``Σ g gᵀ`` to the projections that the call made."""
        g = self.gradient_rows(use, g).to(total.dtype)
        g = g.sum(1) if block.sharing == "reduce" else flatten_rows(g)
        part = total[use.slot]
        for own, rows in zip(part, g.chunk(part.shape[0], dim=1), strict=True):
            second_moment(rows, out=own)

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(3, width, width (+1))."""
        width = layer.embed_dim
        return 3, width, ("in_proj_weight" in names) * width + ("in_proj_bias" in names)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``[W b]`` of the three projections."""
        columns = [p if name == "in_proj_weight" else p[:, None] for name, p in parts.items()]
        V = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        return V.unflatten(0, (3, -1))

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The joint weight and bias."""
        V, parts = V.flatten(0, 1), {}
        if "in_proj_weight" in names:
            parts["in_proj_weight"] = V[:, : layer.embed_dim]
        return parts | ({"in_proj_bias": V[:, -1]} if "in_proj_bias" in names else {})


class SeparateProjectionRule(KroneckerRule):
    """The projection of query, key or value by a weight of its own, without the bias.

    Args:
        which: ``"q_proj"``, ``"k_proj"`` or ``"v_proj"``.
    """

    captured = False
    interceptor = Interceptor

    def __init__(self, which: str) -> None:
        self.attributes = (f"{which}_weight",)

    def rows(self, use: Use) -> Float[Tensor, "examples positions in"]:
        """The input, examples first."""
        return use.input.reshape(use.input.shape[0], -1, use.input.shape[-1])

    def gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "examples positions out"]:
        """The derivatives of the projection."""
        g = use.gradient(g)
        return g.reshape(g.shape[0], -1, g.shape[-1])

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(getattr(layer, self.attributes[0]).shape)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """W."""
        return parts[self.attributes[0]]

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W."""
        return {self.attributes[0]: V.view_as(V)}


def rules_of_attention(layer: nn.MultiheadAttention) -> dict[str, LayerRule]:
    """The rules of the projections that a module has."""
    if layer._qkv_same_embed_dim:
        return {"in_proj": InProjectionRule(), "out_proj": OutProjectionRule()}
    separate: dict[str, LayerRule] = {which: SeparateProjectionRule(which) for which in _SEPARATE}
    return {**separate, "out_proj": OutProjectionRule()}


def _attention_with(linear: Callable[..., Tensor], args: Any, kwargs: Any) -> Any:
    """A call of torch's attention function with another ``linear``: the same code, with names of its own."""
    names = {**vars(F), "linear": linear, "has_torch_function": lambda *_: False}
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        original = getattr(F, name)
        copied = types.FunctionType(original.__code__, names, name, original.__defaults__, original.__closure__)
        copied.__kwdefaults__ = original.__kwdefaults__
        names[name] = copied
    try:
        return names["multi_head_attention_forward"](*args, **kwargs)
    finally:  # these functions and their names hold each other, and `linear` the graph: until the garbage collector
        names.clear()
