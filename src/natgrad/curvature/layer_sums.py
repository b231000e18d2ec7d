"""A layer's sums from its calls: what the rules give, for the leading examples of a pass, added up in place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import LayerSums, to_dense
from natgrad.curvature.gram import Gram
from natgrad.layers.factors import flatten_rows
from natgrad.layers.rules import Block, DiagonalRule, KroneckerRule, Use

# Examples whose derivatives are taken one by one, in one vectorised backward pass.
_EXAMPLES_AT_ONCE = 16


def input_sums(
    block: Block,
    uses: Sequence[Use],
    rows: int,
    factor: Tensor | None = None,
    *,
    outputs: bool = True,
    keep_rows: bool = False,
) -> LayerSums:
    """``Σ ā āᵀ`` over the calls of a layer for the leading examples, with a G of zeros.

    The sums of a :class:`DiagonalRule` start with an A of zeros, and a G that makes ``A ⊗ G`` the sum over the count.

    Args:
        block: of the layer.
        uses: its calls, of the leading examples alone or with a share of them (see :func:`leading_use`).
        rows: the number of leading examples.
        factor: A where it is known: the sum is then that many times A.
        outputs: whether G is a matrix; otherwise it is left empty, for who knows its diagonal.
        keep_rows: keep the rows of a linear layer, where they are fewer than its columns, in the place of matrices.
    """
    a_shape, g_shape = block.factor_shapes
    like = next(iter(block.parameters.values())).detach()
    if isinstance(block.rule, DiagonalRule):
        used = float(rows) if uses else 0.0  # of a bare parameter nothing is known yet
        return LayerSums(like.new_zeros(a_shape, dtype=block.dtype), like.new_full((1,), used, dtype=block.dtype), used)
    assert isinstance(block.rule, KroneckerRule)  # for the type checker
    if keep_rows and (kept := _kept(block, uses)) is not None:
        G: Tensor | Gram = Gram(kept.rows.new_zeros(0, *g_shape[-1:])) if outputs else kept.rows.new_zeros(g_shape[-1:])
        return LayerSums(kept if factor is None else factor.to(block.dtype) * rows, G, float(len(kept.rows)))
    total: Tensor | None = None
    used: float | Tensor = 0.0
    if factor is not None:  # of a linear layer whose every row counts: see natgrad.optim.static
        total = factor.to(block.dtype) * rows
        used = sum(use.share * flatten_rows(use.input).shape[0] for use in uses)
        uses = ()
    for use in uses:
        moment, count = block.rule.input_sum(block, use)
        moment = moment if use.share == 1 else moment.mul_(use.share)
        total = moment if total is None else total.add_(moment)
        used += use.share * count
    if total is None:
        total = like.new_zeros(a_shape, dtype=block.dtype)
    return LayerSums(total, total.new_zeros(g_shape if outputs else g_shape[-1:]), used)


def add_outputs(
    sums: LayerSums,
    block: Block,
    uses: Sequence[Use],
    gradients: list[Tensor],
    rows: int,
    batch: int,
    *,
    together: bool = False,
) -> None:
    """Add ``Σ g gᵀ`` over the calls, or for a diagonal rule the squares of the examples' gradients.

    Args:
        sums: of the layer, added to in place.
        block: of the layer.
        uses: its calls.
        gradients: the derivatives of their outputs.
        rows: the number of leading examples.
        batch: of all examples.
        together: take the square of the gradient of all rows: the derivatives are those of one example in whatever
            row, or their scores are independent with mean zero, so that ``E (Σ_n ∇_n)² = Σ_n E ∇_n²``.
    """
    rule = block.rule
    if isinstance(rule, KroneckerRule):
        for use, g in zip(uses, gradients, strict=True):
            # Rows of other examples hold zeros: where they cannot be told apart they do no harm.
            use, g = _leading_gradient(use, g, rows, batch)
            if isinstance(sums.G, Gram):
                sums.G = sums.G + Gram(flatten_rows(g).to(block.dtype))
            else:
                rule.output_sum(block, use, g, sums.G)
    elif isinstance(rule, DiagonalRule):
        parts = [
            rule.per_example(block, *_leading_gradient(use, g, rows, batch))
            for use, g in zip(uses, gradients, strict=True)
        ]
        if all(part.shape == parts[0].shape for part in parts):  # an example's gradient is the sum over the calls
            parts = [torch.stack(parts).sum(0)] if len(parts) > 1 else parts
        if together:
            parts = [torch.cat(parts).sum(0, keepdim=True)] if parts else []
        for part in parts:
            to_dense(sums.A).add_(part.square().sum(0))


def _kept(block: Block, uses: Sequence[Use]) -> Gram | None:
    """The rows of a linear layer's only call, where they take less memory than the matrix."""
    if not block.rule.by_hand or block.sharing != "expand" or "weight" not in block.members:
        return None
    if len(uses) != 1 or uses[0].share != 1:
        return None
    a = flatten_rows(uses[0].input)
    return Gram(a.to(block.dtype), bias="bias" in block.members) if len(a) < a.shape[1] else None


def leading_use(block: Block, use: Use, rows: int, batch: int, *, apart: bool = False) -> Use:
    """A call of a layer for the leading examples, where they can be told apart (see :func:`leading_examples`).

    Args:
        block: of the layer.
        use: its call.
        rows: the number of leading examples.
        batch: of all examples.
        apart: whether the gradients of single examples are wanted (as they are for a diagonal, or for reduced
            positions): an input with the positions first is turned around.

    Raises:
        ValueError: positions are to be reduced, but the examples cannot be told apart.
    """
    told_apart = apart or isinstance(block.rule, DiagonalRule) or block.sharing == "reduce"
    if told_apart and use.input.shape[:1] != (batch,):
        if block.rule.features_last and use.input.ndim > 2 and use.input.shape[1] == batch and use.arrange is None:
            use = replace(use, input=use.input.transpose(0, 1), arrange=_swap)  # positions first
        elif block.sharing == "reduce":
            raise ValueError(
                f"layer {block.name!r} sees a tensor of shape {tuple(use.input.shape)} without the {batch} examples in "
                f"dimension 0, so that their positions cannot be reduced; leave it at 'expand': pass a mapping from "
                "layer names as sharing="
            )
    if rows == batch:
        return use
    a, share = leading_examples(use.input, rows, batch)
    shape = use.output_shape
    if share == 1 and use.arrange is None and shape[:1] == (batch,):
        shape = torch.Size((rows, *shape[1:]))
    return replace(use, input=a, output_shape=shape, share=share, whole=use.input)


def _leading_gradient(use: Use, g: Tensor, rows: int, batch: int) -> tuple[Use, Tensor]:
    """The leading examples' derivatives, in the order of the call's input."""
    if use.arrange is None:
        return use, leading_examples(g, rows, batch)[0]
    return replace(use, arrange=None), leading_examples(use.arrange(g), rows, batch)[0]


def _swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def example_by_example(stack: Float[Tensor, "k rows ..."]) -> Iterator[Float[Tensor, "m rows ..."]]:
    """The same cotangents, each of one example alone: the others are zero."""
    for cotangent in stack:
        for start in range(0, cotangent.shape[0], _EXAMPLES_AT_ONCE):
            index = torch.arange(start, min(start + _EXAMPLES_AT_ONCE, cotangent.shape[0]), device=stack.device)
            alone = cotangent.new_zeros(len(index), *cotangent.shape)
            alone[index - start, index] = cotangent[index]
            yield alone


def examples_apart(x: Tensor, batch: int) -> bool:
    """Whether a layer's input has a dimension for the examples: 0, or 1 behind several positions.

    Without one its rows may be examples and positions side by side, or positions that serve all examples (those of a
    learned position embedding), whose derivatives are then sums over examples.

    Args:
        x: the input.
        batch: the number of examples; where targets of sequences were flattened, that of all positions.
    """
    return x.shape[:1] == (batch,) or (x.ndim > 1 and x.shape[0] > 1 and x.shape[1] == batch)


def leading_examples(x: Tensor, rows: int, batch: int) -> tuple[Tensor, float]:
    """The first ``rows`` examples of a tensor, and the share of them in what is returned.

    The examples are in dimension 0. A tensor with another one (positions first, examples and positions flattened) is
    returned whole: then the share is ``rows / batch``, by which a sum over all of its rows estimates that over the
    leading examples.
    """
    if rows == batch:
        return x, 1.0
    return (x[:rows], 1.0) if x.ndim > 1 and x.shape[0] == batch else (x, rows / batch)
