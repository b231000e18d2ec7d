"""Block-diagonal K-FAC: statistics of a batch, factors, inverses of blocks [KFAC, sec. 3, 4.2, 5, 6.3]."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.base import Diagonal, Factors, LayerSums, Statistics, factors_from, to_dense
from natgrad.curvature.cotangents import check_expectation, cotangents, fisher_diagonal, validate_targets
from natgrad.curvature.ekfac import GradientSquares
from natgrad.curvature.inverse import (
    BlockInverse,
    Eigenbasis,
    ExactInverse,
    FactoredInverse,
    eigenbasis,
    invert_block,
)
from natgrad.curvature.pairs import PairSums
from natgrad.layers.capture import Capture, Record
from natgrad.layers.factors import flatten_rows, input_moment, second_moment
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
) -> Statistics:
    """Statistics of one batch, by an eager pass of its own: works with compiled and checkpointed models.

    Buffers and the global random streams are left as they were. Arguments as in :func:`statistics_from`; with
    ``chain``, its ``order`` is found from the forward pass.
    """
    check_expectation(likelihood, expectation, y, samples)
    batch_size(x)  # refuses an empty batch
    with view.curvature_pass(), view.snapshot():
        with torch.enable_grad(), capture.record() as record:
            z = view(x)
        check_captured(record, z)
        validate_targets(likelihood, z.detach(), y)
        return statistics_from(
            record,
            z,
            likelihood,
            targets=y,
            weight=weight,
            expectation=expectation,
            samples=samples,
            generator=generator,
            diagonal_output=diagonal_output,
            bases=bases,
            order=record.chain_order(z) if chain else (),
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
    diagonal = fisher_diagonal(likelihood, z_rows, targets, weight) if source is not None else None
    known = (
        {source: flatten_rows(diagonal.expand_as(z_rows)).sum(0)} if source is not None and diagonal is not None else {}
    )
    inputs = record.inputs
    known_A = {} if order or input_factors is None else input_factors
    sums = {
        name: input_sums(layer, inputs.get(name, []), rows, batch, known_A.get(name), outputs=name not in known)
        for name, layer in record.layers.items()
    }
    squares: GradientSquares | None = None
    if bases:
        parts = {name: trainable_parts(record.layers[name]) for name in bases}
        squares = GradientSquares(record, bases, parts, rows, batch)
    pairs: PairSums | None = None
    if order:
        parts = {name: trainable_parts(record.layers[name]) for name in order}
        pairs = PairSums(record, order, sums, parts, lambda x: leading_examples(x, rows, batch))
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
        for stack in stacks:
            for found in output_gradients(record, z, stack):
                for name in known:
                    found.pop(name, None)
                for name, gradients in found.items():
                    _add_outputs(sums[name], gradients, rows, batch)
                if squares is not None:
                    squares.add(found)
                if pairs is not None:
                    pairs.add(found)
    for name, vector in known.items():
        sums[name].G = vector.to(sums[name].A.dtype)
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


def trainable_parts(layer: nn.Linear) -> tuple[bool, bool]:
    """Whether the weight and the bias of a linear layer are trained: a block covers just what is."""
    bias = layer.bias
    return layer.weight.requires_grad, bias is not None and bias.requires_grad


def check_captured(record: Record, z: Tensor) -> None:
    """Refuse a layer whose parameters act on z although it was never called, for its hooks saw nothing.

    Raises:
        ValueError: there is such a layer; it is named.
    """
    for name, calls in record.calls.items():
        parameters = [p for p in record.layers[name].parameters() if p.requires_grad]
        if calls or not parameters or not z.requires_grad:
            continue
        found = torch.autograd.grad(z, parameters, torch.ones_like(z), retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found):
            raise ValueError(
                f"layer {name!r}: the model uses its parameters without calling it (a functional call, a fused "
                "kernel), so its inputs cannot be captured; call the layer itself, or freeze it"
            )


def input_sums(
    layer: nn.Linear,
    inputs: list[Tensor],
    rows: int,
    batch: int,
    factor: Tensor | None = None,
    *,
    outputs: bool = True,
) -> LayerSums:
    """``Σ ā āᵀ`` over the calls of a layer for the leading examples, with a G of zeros.

    Args:
        layer: the layer.
        inputs: of its calls.
        rows: the number of leading examples.
        batch: the number of all examples.
        factor: A where it is known: the sum is then that many times A.
        outputs: whether G is a matrix; otherwise it is left empty, for who knows its diagonal.
    """
    weight, bias = trainable_parts(layer)
    dtype = _accumulator(layer.weight.dtype)
    total: Tensor | None = None
    used = 0.0
    for a in inputs:
        a, share = leading_examples(a, rows, batch)
        if factor is None:
            moment = input_moment(a.to(dtype), weight, bias)
            moment = moment if share == 1 else moment.mul_(share)
            total = moment if total is None else total.add_(moment)
        used += share * (a.numel() // a.shape[-1])
    out, columns = layer.weight.shape[0], layer.weight.shape[1] * weight + bias
    if factor is not None:
        total = factor.to(dtype) * rows
    elif total is None:
        total = layer.weight.new_zeros(columns, columns, dtype=dtype)
    return LayerSums(total, total.new_zeros(out, out) if outputs else total.new_zeros(out), used)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over many rows: single precision at least."""
    return torch.promote_types(dtype, torch.float32)


def _add_outputs(sums: LayerSums, gradients: list[Tensor], rows: int, batch: int) -> None:
    for g in gradients:
        # Rows of other examples hold zeros: where they cannot be told apart they do no harm.
        second_moment(flatten_rows(leading_examples(g, rows, batch)[0]).to(sums.G.dtype), out=sums.G)


def leading_examples(x: Tensor, rows: int, batch: int) -> tuple[Tensor, float]:
    """The first ``rows`` examples of a tensor, and the share of them in what is returned.

    The examples are in dimension 0. A tensor with another one (positions first, examples and positions flattened) is
    returned whole: then the share is ``rows / batch``, by which a sum over all of its rows estimates that over the
    leading examples.
    """
    if rows == batch:
        return x, 1.0
    return (x[:rows], 1.0) if x.ndim > 1 and x.shape[0] == batch else (x, rows / batch)


def output_gradients(record: Record, z: Tensor, stack: Float[Tensor, "k rows ..."]) -> list[dict[str, list[Tensor]]]:
    """The g's of every cotangent of a stack; one vectorised backward pass where that works."""
    if stack.shape[1] < z.shape[0]:
        whole = stack.new_zeros(stack.shape[0], *z.shape)
        whole[:, : stack.shape[1]] = stack
        stack = whole
    stack = stack.to(z.dtype)
    if len(stack) > 1:
        try:
            found = record.output_gradients(z, stack, batched=True)
        except (RuntimeError, NotImplementedError):  # an operation without a batching rule: one by one
            pass
        else:
            return [{name: [g[i] for g in gs] for name, gs in found.items()} for i in range(len(stack))]
    return [record.output_gradients(z, cotangent) for cotangent in stack]
