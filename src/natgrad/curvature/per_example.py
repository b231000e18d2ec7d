"""Gradients of single examples: a and g for linear layers, ``torch.func``, a few examples at a time, for the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from natgrad.curvature.gradient_rows import GradientRows, LinearRows, TensorRows, written_out
from natgrad.layers.capture import Capture, Record
from natgrad.layers.coverage import cover
from natgrad.likelihoods import Likelihood
from natgrad.model_view import ModelView, batch_size, select_rows
from natgrad.operators.jacobian_products import refuse_sparse
from natgrad.replay import Replay

# What the gradients and activations of one pass over a few examples may occupy, roughly.
_CHUNK_BYTES = 2**28

# Inputs and targets with other tensors in the place of those that have the examples in dimension 0.
Rebuild = Callable[[list[Tensor]], Any]


@dataclass
class Passed:
    """What one pass over a batch found.

    Attributes:
        z: the output, detached.
        nll: summed over the batch, divided by nothing.
        rows: per-example gradients, of all examples or of those asked for.
        gradient: of the summed nll over all examples; None where it is ``rows.combine(ones)``.
    """

    z: Tensor
    nll: Float[Tensor, ""]
    rows: GradientRows
    gradient: Float[Tensor, " P"] | None = None


class PerExampleGradients:
    """Computes per-example gradients of a model, batch after batch.

    Dropout draws the same masks for all rows where the batch is one pass of ``torch.func``; else the rows of each pass
    have masks of their own.

    Args:
        view: the model.
        chunk_size: how many examples ``torch.func`` treats in one pass; by default what fits into about 256 MiB.

    Raises:
        ValueError: a chunk size below 1.
    """

    def __init__(self, view: ModelView, chunk_size: int | None = None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: expected at least one example in a pass, or None")
        refuse_sparse(view)
        self.view, self.chunk_size = view, chunk_size
        coverage = cover(view, uncovered="identity", structure="layerwise")
        layers: dict[str, nn.Linear] = {
            name: layer
            for name, layer in coverage.layers.items()
            if isinstance(layer, nn.Linear) and coverage.members[name][0] is not None
        }
        self.members = {name: coverage.members[name] for name in layers}
        self.capture = Capture(view.model, layers)
        self._checked = False

    @torch.no_grad()
    def __call__(self, likelihood: Likelihood, x: Any, y: Any, index: Tensor | None = None) -> Passed:
        """One forward and one backward pass, and per-example passes for the parameters of other layers.

        Args:
            likelihood: p(y|z); gradients are those of each example's own summed nll.
            x: one batch.
            y: its targets.
            index: the examples whose gradients are wanted; default all.
        """
        before = self.view.snapshot()
        with torch.enable_grad(), self.capture.record() as record:
            z = self.view(x)
            leaf = z.detach().requires_grad_()
            nll = likelihood.nll(leaf, y, count=z.new_ones(()))
            (score,) = torch.autograd.grad(nll, leaf)
        return self.from_cotangents(record, z, score, likelihood, x, y, nll.detach(), index, before)

    def from_cotangents(
        self,
        record: Record,
        z: Tensor,
        score: Tensor,
        likelihood: Likelihood,
        x: Any,
        y: Any,
        nll: Tensor,
        index: Tensor | None,
        before: Replay,
    ) -> Passed:
        """The backward half of a call; ``before`` is the state before its forward half."""
        n = z.shape[0]
        names = self.view.names
        weights = torch.arange(n, dtype=score.dtype, device=score.device).mul(2.4).cos()  # no two alike
        weighted = None
        if not self._checked:
            spread = weights.view(n, *[1] * (score.ndim - 1))
            weighted = self._by_name(record.gradients(z, score * spread, self._parameters(), retain_graph=True)[1])
        drawn = before.drawn()
        total = None
        if index is not None or drawn:
            g, found = record.gradients(z, score, self._parameters(), retain_graph=False)
            total = self._by_name(found)
        else:
            g, _ = record.gradients(z, score, retain_graph=False)
        blocks = {name: self._layer_rows(name, record, g, n) for name in self.members}
        if weighted is not None:
            self._distrust(blocks, weighted, weights)
        linear = [block for block in blocks.values() if block is not None]
        if index is not None:
            linear = [block.select(index) for block in linear]
        covered = {name for block in linear for name in block.names}
        others = tuple(name for name in names if name not in covered)
        explicit: list[TensorRows] = []
        if others:
            explicit = self._func_rows(likelihood, x, y, index, others, before)
        if index is None and total is not None and _add_up(explicit, total):
            total = None
        gradient = None if total is None else self.view.to_vector(total)
        return Passed(z.detach(), nll, GradientRows(self.view, [*written_out(linear), *explicit]), gradient)

    def _layer_rows(self, name: str, record: Record, g: Mapping[str, list[Tensor]], n: int) -> LinearRows | None:
        """A layer's rows; None where its inputs do not have the examples in dimension 0."""
        calls = record.inputs.get(name)
        if not calls or any(a.ndim < 2 or a.shape[0] != n for a in calls):
            return None
        weight, bias = self.members[name]
        a = [call.reshape(n, -1, call.shape[-1]) for call in calls]
        derivatives = [one.reshape(n, -1, one.shape[-1]) for one in g[name]]
        assert weight is not None  # others were left out at the start
        joined = (a[0], derivatives[0]) if len(a) == 1 else (torch.cat(a, 1), torch.cat(derivatives, 1))
        return LinearRows(*joined, weight, bias)

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.view.parameters.values())

    def _by_name(self, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
        pairs = zip(self.view.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if d is None else d for (name, p), d in pairs}

    def _distrust(
        self, blocks: dict[str, LinearRows | None], total: Mapping[str, Tensor], weights: Float[Tensor, " n"]
    ) -> None:
        """Once: written-out rows for layers whose gradients do not add up to the batch's, weighted by example.

        So it is with layers that are used in other ways too, and with those that have something else than the examples
        in dimension 0, although as much of it.
        """
        self._checked = True
        for name, block in list(blocks.items()):
            right = block is not None
            if block is not None:
                for parameter, summed in block.combine(weights.to(block.g.dtype)).items():
                    # a loss that is not finite tells nothing: look again at the next batch
                    if not torch.isfinite(total[parameter].sum()):
                        self._checked = False
                    elif _differ(summed, total[parameter]):
                        right = False
            if not right:
                blocks[name] = None
                del self.members[name]

    def _func_rows(
        self, likelihood: Likelihood, x: Any, y: Any, index: Tensor | None, names: tuple[str, ...], before: Replay
    ) -> list[TensorRows]:
        """Rows of some parameters by ``vmap(grad)`` in chunks, or one example after the other where vmap fails."""
        view, n = self.view, batch_size(x)
        leaves, rebuild = _batched_leaves((x, y), n)
        if index is not None:
            leaves, n = [leaf[index] for leaf in leaves], len(index)
        parameters = {name: view.parameters[name].detach() for name in names}
        rows = {name: p.new_empty(n, p.numel()) for name, p in parameters.items()}
        size = self.chunk_size or self._affordable(sum(p.numel() for p in parameters.values()))
        gradients = _by_vmap
        with before, view.curvature_pass():
            start = 0
            while start < n:
                part = slice(start, min(n, start + size))
                try:
                    found = gradients(view, likelihood, parameters, [leaf[part] for leaf in leaves], rebuild)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:
                    if gradients is _one_by_one:
                        raise
                    gradients = _one_by_one
                    continue
                for name, gradient in found.items():
                    rows[name][part] = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
                start = part.stop
        return [TensorRows(rows[name], name, view.parameters[name].shape) for name in names]

    def _affordable(self, size: int) -> int:
        element = torch.empty(0, dtype=self.view.dtype).element_size()
        # activations are not known; a layer's are rarely more than a few times its parameters
        return max(1, _CHUNK_BYTES // (element * (4 * size + self.view.num_parameters)))


def _differ(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(found - expected) > 1e-3 * torch.linalg.vector_norm(expected))


def _add_up(blocks: Sequence[TensorRows], total: Mapping[str, Tensor]) -> bool:
    """Whether the rows are those of the pass that found the gradient: chunks draw other masks for dropout."""
    return not any(_differ(block.rows.sum(0).view(block.shape), total[block.name]) for block in blocks)


def _by_vmap(
    view: ModelView, likelihood: Likelihood, parameters: Mapping[str, Tensor], leaves: list[Tensor], rebuild: Rebuild
) -> dict[str, Tensor]:
    def loss(values: Mapping[str, Tensor], example: list[Tensor]) -> Tensor:
        x_one, y_one = rebuild([leaf[None] for leaf in example])
        z = view.functional(values, x_one)
        return likelihood.nll(z, y_one, count=z.new_ones(()))

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(dict(parameters), leaves)


def _one_by_one(
    view: ModelView, likelihood: Likelihood, parameters: Mapping[str, Tensor], leaves: list[Tensor], rebuild: Rebuild
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(leaves[0])):
        x_one, y_one = rebuild([leaf[i : i + 1] for leaf in leaves])
        with torch.enable_grad():
            values = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            z = view.functional(values, x_one)
            loss = likelihood.nll(z, y_one, count=z.new_ones(()))
            gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(values, gradients, strict=True):
            found[name].append(gradient)
    return {name: torch.stack(parts) for name, parts in found.items()}


def _batched_leaves(nest: Any, n: int) -> tuple[list[Tensor], Rebuild]:
    """The leaves with the examples in dimension 0, and how the nest is made again from others in their place."""
    plain = pytree.tree_map(lambda part: part, tuple(select_rows(part, slice(None)) for part in nest))
    leaves, spec = pytree.tree_flatten(plain)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == n]

    def rebuild(found: list[Tensor]) -> Any:
        filled = list(leaves)
        for place, leaf in zip(places, found, strict=True):
            filled[place] = leaf
        return pytree.tree_unflatten(filled, spec)

    return [leaves[place] for place in places], rebuild
