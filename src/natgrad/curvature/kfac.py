"""Block-diagonal K-FAC: statistics of a batch, factors, inverses of blocks [KFAC, sec. 3, 4.2, 5, 6.3]."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.base import Diagonal, Factors, Statistics, factors_from, to_dense
from natgrad.curvature.block_inverse import BlockInverse, FactoredInverse
from natgrad.curvature.cotangents import check_expectation, cotangents, fisher_diagonal, validate_targets
from natgrad.curvature.ekfac import GradientSquares
from natgrad.curvature.inverse import Eigenbasis, ExactInverse, eigenbasis, invert_block
from natgrad.curvature.layer_sums import (
    add_outputs,
    example_by_example,
    examples_apart,
    input_sums,
    leading_examples,
    leading_use,
)
from natgrad.curvature.pairs import PairSums
from natgrad.curvature.uncovered import couples_examples
from natgrad.layers.bare import BareRule
from natgrad.layers.capture import Capture, Record
from natgrad.layers.factors import flatten_rows
from natgrad.layers.rules import DiagonalRule
from natgrad.likelihoods import Likelihood, is_plain_sum
from natgrad.model_view import ModelView, batch_size, select_rows

__all__ = [
    "BlockInverse",
    "Diagonal",
    "Eigenbasis",
    "ExactInverse",
    "FactoredInverse",
    "Factors",
    "Statistics",
    "collect",
    "eigenbasis",
    "factors_from",
    "invert_block",
    "statistics_from",
    "to_dense",
]


def collect(
    view: ModelView,
    capture: Capture,
    likelihood: Likelihood,
    x: Any,
    *,
    expectation: str = "sampled",
    y: Any = None,
    weight: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    diagonal_output: bool = True,
    bases: Mapping[str, Eigenbasis] | None = None,
    chain: bool = False,
    share: float = 1.0,
) -> Statistics:
    """Statistics of one batch, by an eager pass of its own: works with compiled and checkpointed models.

    Buffers and the global random streams are left as they were. Arguments as in :func:`share_of_statistics`; with
    ``chain``, its ``order`` is found from the forward pass.
    """
    check_expectation(likelihood, expectation, y, samples)
    batch_size(x)  # refuses an empty batch
    with view.curvature_pass(), view.snapshot():
        with torch.enable_grad(), capture.record() as record:
            z = view(x)
        record.refuse_hidden(z)
        record = record.take(z)
        check_captured(record, z)
        validate_targets(likelihood, z.detach(), y)
        with torch.autocast(z.device.type, enabled=False):
            return share_of_statistics(
                record,
                z,
                likelihood,
                share=share,
                targets=y,
                weight=weight,
                expectation=expectation,
                samples=samples,
                generator=generator,
                diagonal_output=diagonal_output,
                bases=bases,
                order=record.chain_order(z) if chain else (),
                coupled=couples_examples(view.module),
            )


@torch.no_grad()
def statistics_from(
    record: Record,
    z: Float[Tensor, "batch ..."],
    likelihood: Likelihood,
    *,
    rows: int | None = None,
    targets: Any = None,
    weight: Tensor | None = None,
    expectation: str = "sampled",
    samples: int = 1,
    generator: torch.Generator | None = None,
    diagonal_output: bool = True,
    input_factors: Mapping[str, Tensor] | None = None,
    bases: Mapping[str, Eigenbasis] | None = None,
    order: Sequence[str] = (),
    coupled: bool = False,
    keep_rows: bool = False,
) -> Statistics:
    """Statistics from a forward pass that was recorded, by further backward passes; its graph is kept.

    Args:
        record: of the forward pass.
        z: its output, with its graph.
        likelihood: p(y | z).
        rows: take the first so many examples only; dimension 0 of z is that of the examples.
        targets: y of the whole batch; for ``"empirical"``, and where the curvature or the count depends on y.
        weight: per-target weights of the loss.
        expectation: ``"exact"`` (all of F_R), ``"sampled"`` (y drawn from the model) or ``"empirical"`` (y given).
        samples: draws of y per example.
        generator: the source of the draws.
        diagonal_output: use the output layer's G where it is diagonal and known without sampling (Gaussian and
            Bernoulli).
        input_factors: A of layers where it is known; their inputs are not summed.
        bases: of layers whose squared per-example gradients are summed too, in that basis.
        order: the layers of a chain in forward order, whose neighbours' cross factors are wanted too. All factors then
            come from the same rows and draws: ``diagonal_output`` and ``input_factors`` have no effect.
        coupled: whether an example's output depends on the other examples; the derivatives of an exact expectation
            are then taken example by example. So they are where some input does not have the examples in a dimension
            of its own, for what came out may then serve several of them.
        keep_rows: keep rows in the place of matrices where they are fewer than columns (:class:`Gram`).

    Raises:
        ValueError: targets are missing, the expectation is unknown, or neighbours were used on different rows.
        RuntimeError: as :attr:`Record.inputs` and :meth:`Record.output_gradients`.
    """
    check_expectation(likelihood, expectation, targets, samples, name="targets" if rows else "y")
    batch = z.shape[0]
    rows = batch if rows is None else min(rows, batch)
    z_rows = z.detach()[:rows]
    z_rows = z_rows.to(_accumulator(z.dtype))  # under autocast z has few digits: counts and sums would lose some
    if rows < batch:
        targets = None if targets is None else select_rows(targets, slice(0, rows))
        weight = weight[:rows] if weight is not None and weight.ndim and weight.shape[0] == batch else weight
    source = record.source(z) if diagonal_output and not order and expectation != "empirical" else None
    source = source if source is not None and record.blocks[source].rule.by_hand else None
    diagonal = fisher_diagonal(likelihood, z_rows, targets, weight) if source is not None else None
    known = (
        {source: flatten_rows(diagonal.expand_as(z_rows)).sum(0)} if source is not None and diagonal is not None else {}
    )
    uses = record.uses
    apart = not coupled and all(examples_apart(use.input, batch) for found in uses.values() for use in found)
    alone = expectation == "exact" and not apart
    together = alone or (expectation == "sampled" and coupled)
    span = {
        name: batch if together and isinstance(block.rule, DiagonalRule) else rows
        for name, block in record.blocks.items()
    }
    uses = {
        name: [leading_use(record.blocks[name], use, span[name], batch, apart=name in (bases or ())) for use in found]
        for name, found in uses.items()
    }
    known_A = {} if order or input_factors is None else input_factors
    sums = {
        name: input_sums(
            block, uses.get(name, []), rows, known_A.get(name), outputs=name not in known, keep_rows=keep_rows
        )
        for name, block in record.blocks.items()
    }
    squares: GradientSquares | None = None
    if bases:
        squares = GradientSquares(record.blocks, uses, bases, rows)
    pairs: PairSums | None = None
    if order:
        parts = {name: trainable_parts(record.layers[name]) for name in order}
        pairs = PairSums(record, order, sums, parts, lambda x: leading_examples(x, rows, batch))
    bare = {name: block for name, block in record.blocks.items() if isinstance(block.rule, BareRule)}
    if sums.keys() - known.keys():
        stacks = cotangents(
            likelihood,
            z_rows,
            expectation=expectation,
            targets=targets,
            weight=weight,
            samples=samples,
            generator=generator,
        )
        if alone or (bare and expectation != "sampled"):
            stacks = (part for stack in stacks for part in example_by_example(stack))
        parameters = [p for block in bare.values() for p in block.parameters.values()]
        for stack in stacks:
            for found, bare_gradients in _derivatives(record, z, stack, parameters):
                for name in known:
                    found.pop(name, None)
                for name, gradients in found.items():
                    block = record.blocks[name]
                    add_outputs(sums[name], block, uses[name], gradients, span[name], batch, together=together)
                if squares is not None:
                    squares.add(found, alone)
                if pairs is not None:
                    pairs.add(found)
                for name, gradient in zip(bare, bare_gradients, strict=True):
                    if gradient is not None:
                        squares_of = to_dense(sums[name].A)  # a vector
                        squares_of.add_(gradient.to(squares_of.dtype).flatten().square())
                        sums[name].rows = float(rows)
                        to_dense(sums[name].G).fill_(rows)
    for name, vector in known.items():
        sums[name].G = vector.to(record.blocks[name].dtype)
        if squares is not None and diagonal is not None:
            squares.add_diagonal(name, diagonal.expand_as(z_rows))
    if squares is not None:
        for name, total in squares.sums.items():
            sums[name].squares = total
    if pairs is not None:
        sums |= pairs.sums
    count: Tensor | float = float(rows)
    if expectation != "empirical":
        count = torch.as_tensor(likelihood.count(z_rows, targets, weight), dtype=z_rows.dtype, device=z.device)
    additive = expectation == "empirical" or not is_plain_sum(likelihood)
    return Statistics(sums, float(rows), count, additive)


def share_of_statistics(
    record: Record, z: Float[Tensor, "batch ..."], likelihood: Likelihood, *, share: float = 1.0, **how: Any
) -> Statistics:
    """As :func:`statistics_from`, estimated from the first examples: those count for the whole batch.

    Args:
        record: of the forward pass.
        z: its output.
        likelihood: p(y | z).
        share: of the examples, in (0, 1].
        how: as for :func:`statistics_from`.
    """
    batch = z.shape[0]
    rows = math.ceil(share * batch)
    found = statistics_from(record, z, likelihood, rows=rows if rows < batch else None, **how)
    return found.standing_for(batch)


def trainable_parts(layer: nn.Linear) -> tuple[bool, bool]:
    """Whether the weight and the bias of a linear layer are trained: a block covers just what is."""
    bias = layer.bias
    return layer.weight.requires_grad, bias is not None and bias.requires_grad


def check_captured(record: Record, z: Tensor) -> None:
    """Refuse a layer whose parameters act on z by ways that its hooks did not see.

    Raises:
        ValueError: there is such a layer; it is named.
    """
    blocks = {n: b for n, b in record.blocks.items() if not isinstance(b.rule, BareRule)}
    for name, calls in record.calls.items():
        if name not in blocks or not z.requires_grad:
            continue
        parameters = list(blocks[name].parameters.values())
        if calls or not parameters:
            continue
        found = torch.autograd.grad(z, parameters, torch.ones_like(z), retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found):
            raise ValueError(
                f"layer {name!r}: the model uses its parameters without calling it (a functional call, a fused "
                "kernel, a part that is compiled), so its inputs cannot be captured; call the layer itself, or freeze "
                "it; where it is compiled, call update(x)"
            )
    for name, extra in record.used_elsewhere(z).items():
        raise ValueError(
            f"layer {name!r}: the model uses its {extra} outside of the layer too (such as in a functional call with "
            "the same weight), so its statistics would be incomplete; call the layer itself, or leave the parameter "
            "out (requires_grad_(False), a copy of its own)"
        )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over many rows: single precision at least."""
    return torch.promote_types(dtype, torch.float32)


def output_gradients(record: Record, z: Tensor, stack: Float[Tensor, "k rows ..."]) -> list[dict[str, list[Tensor]]]:
    """The g's of every cotangent of a stack; one vectorised backward pass where that works."""
    return [found for found, _ in _derivatives(record, z, stack)]


def _derivatives(
    record: Record, z: Tensor, stack: Float[Tensor, "k rows ..."], parameters: Iterable[Tensor] = ()
) -> list[tuple[dict[str, list[Tensor]], list[Tensor | None]]]:
    """As :func:`output_gradients`, and the gradients of some parameters."""
    if stack.shape[1] < z.shape[0]:
        whole = stack.new_zeros(stack.shape[0], *z.shape)
        whole[:, : stack.shape[1]] = stack
        stack = whole
    stack, parameters = stack.to(z.dtype), list(parameters)
    if len(stack) > 1:
        try:
            found, gradients = record.gradients(z, stack, parameters, batched=True)
        except (RuntimeError, NotImplementedError):  # an operation without a batching rule: one by one
            pass
        else:
            return [
                (
                    {name: [g[i] for g in gs] for name, gs in found.items()},
                    [g if g is None else g[i] for g in gradients],
                )
                for i in range(len(stack))
            ]
    return [record.gradients(z, cotangent, parameters) for cotangent in stack]


def _each(found: Mapping[str, list[Tensor]], index: int) -> dict[str, list[Tensor]]:
    return {name: [g[index] for g in gradients] for name, gradients in found.items()}
