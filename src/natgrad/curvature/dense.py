r"""Small models, large matrices: the Kronecker approximation of every pair of layers, and exact blocks.

"full" is F̃ of [KFAC, sec. 3]: the block of layers i and j is ``E[ā_i ā_jᵀ] ⊗ E[g_i g_jᵀ]``. "exact_block" has the
exact curvature ``E[(ā ⊗ g)(ā ⊗ g)ᵀ]`` of every layer [KFAC, sec. 3; NOTE, sec. 2.3] and nothing between layers.
"""

from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import LayerSums, Statistics, kron
from natgrad.curvature.cotangents import check_expectation, cotangents, validate_targets
from natgrad.curvature.kfac import output_gradients, trainable_parts
from natgrad.layers.capture import Capture, Record
from natgrad.layers.factors import flatten_rows, second_moment, with_ones
from natgrad.likelihoods import Likelihood, is_plain_sum
from natgrad.model_view import ModelView


@torch.no_grad()
def collect_dense(
    view: ModelView,
    capture: Capture,
    likelihood: Likelihood,
    x: Any,
    *,
    structure: str,
    expectation: str,
    y: Any = None,
    weight: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Statistics:
    """Statistics of one batch for "full" or "exact_block".

    For "full" one entry, named "", with the second moments of all ā side by side and of all g side by side, layers in
    order. Rows of different layers belong together by their position: all layers need the same number of rows. For
    "exact_block" one entry per layer whose ``A`` is the sum of outer products of per-example gradients (columns of
    ``[W b]`` stacked) and whose ``G`` is 1.

    Raises:
        ValueError: layers with different numbers of rows ("full"), or without the examples in dimension 0
            ("exact_block").
    """
    check_expectation(likelihood, expectation, y, samples)
    with view.curvature_pass(), view.snapshot():
        with torch.enable_grad(), capture.record() as record:
            z = view(x)
        validate_targets(likelihood, z.detach(), y)
        stacks = cotangents(
            likelihood,
            z.detach(),
            expectation=expectation,
            targets=y,
            weight=weight,
            samples=samples,
            generator=generator,
        )
        gradients = (found for stack in stacks for found in output_gradients(record, z, stack))
        collected = _all_pairs if structure == "full" else _exact_blocks
        layers = collected(record, gradients, z.shape[0])
    count: Tensor | float = float(z.shape[0])
    if expectation != "empirical":
        count = torch.as_tensor(likelihood.count(z.detach(), y, weight), dtype=z.dtype, device=z.device)
    additive = expectation == "empirical" or not is_plain_sum(likelihood)
    return Statistics(layers, float(z.shape[0]), count, additive)


def pair_blocks(
    A: Float[Tensor, "columns columns"], G: Float[Tensor, "outs outs"], sizes: list[tuple[int, int]]
) -> Float[Tensor, "size size"]:
    """The matrix of blocks ``A_ij ⊗ G_ij`` from all A's and all G's side by side.

    Args:
        A: second moments of all ā.
        G: second moments of all g.
        sizes: (columns, out) of every layer.
    """
    columns, outs = ([size[i] for size in sizes] for i in (0, 1))
    rows = []
    for A_row, G_row in zip(A.split(columns), G.split(outs), strict=True):
        pairs = zip(A_row.split(columns, dim=1), G_row.split(outs, dim=1), strict=True)
        rows.append(torch.cat([kron(a, g) for a, g in pairs], dim=1))
    return torch.cat(rows)


def _all_pairs(record: Record, gradients: Any, batch: int) -> dict[str, LayerSums]:
    inputs = record.inputs
    _check_called(record, inputs)
    a = {n: torch.cat([_joint_inputs(record, n, found) for found in inputs[n]]) for n in record.layers}
    rows = {name: found.shape[0] for name, found in a.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"structure='full' pairs the rows of all layers, but they differ: {rows}; use 'block_diagonal' or "
            "'exact_block' for layers used on different numbers of positions"
        )
    total: Tensor | None = None
    for found in gradients:
        g = torch.cat([torch.cat([flatten_rows(x) for x in found[name]]) for name in record.layers], dim=1)
        total = second_moment(g, out=total)
    assert total is not None  # every expectation yields a cotangent
    return {"": LayerSums(second_moment(torch.cat(list(a.values()), dim=1)), total, float(next(iter(rows.values()))))}


def _exact_blocks(record: Record, gradients: Any, batch: int) -> dict[str, LayerSums]:
    inputs = record.inputs
    _check_called(record, inputs)
    a = {name: [_per_example(name, _with_ones(record, name, x), batch) for x in inputs[name]] for name in record.layers}
    totals: dict[str, Tensor] = {}
    for found in gradients:
        for name in record.layers:
            outers = [
                torch.einsum("nri,nro->nio", x, _per_example(name, g, batch))
                for x, g in zip(a[name], found[name], strict=True)
            ]
            outer = reduce(torch.add, outers)
            totals[name] = second_moment(outer.flatten(1), out=totals.get(name))
    return {name: LayerSums(total, total.new_ones(1, 1) * 0 + 1, 1.0) for name, total in totals.items()}


def _with_ones(record: Record, name: str, a: Tensor) -> Tensor:
    return _joint_inputs(record, name, a).reshape(*a.shape[:-1], -1)


def _joint_inputs(record: Record, name: str, a: Tensor) -> Tensor:
    weight, bias = trainable_parts(record.layers[name])
    return with_ones(a, bias) if weight else flatten_rows(a.new_ones(*a.shape[:-1], 1))


def _per_example(name: str, x: Tensor, batch: int) -> Float[Tensor, "batch rows d"]:
    if x.ndim < 2 or x.shape[0] != batch:
        raise ValueError(
            f"layer {name!r} sees a tensor of shape {tuple(x.shape)} without the {batch} examples in dimension 0; its "
            "exact block cannot be told apart by example: use structure='block_diagonal'"
        )
    return x.reshape(batch, -1, x.shape[-1])


def _check_called(record: Record, inputs: dict[str, list[Tensor]]) -> None:
    for name in record.layers:
        if name not in inputs:
            raise ValueError(
                f"layer {name!r} was not called by the forward pass: freeze it or use structure='block_diagonal'"
            )
