"""Loss, gradient and curvature statistics of a batch, in one walk over its chunks.

The rows that curvature is estimated from (τ₂ m of them, the first τ₁ m of those for the factors [KFAC, sec. 8]) form a chunk
of their own. Its single forward pass serves the gradient, the backward pass with sampled targets and the linearised pass; the
other rows see nothing but the gradient.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import LayerSums, Statistics
from natgrad.curvature.cotangents import validate_targets
from natgrad.curvature.kfac import check_captured, statistics_from, trainable_parts
from natgrad.curvature.uncovered import couples_examples, squared_gradients
from natgrad.layers.capture import Capture, Record
from natgrad.layers.factors import flatten_rows
from natgrad.likelihoods import Likelihood
from natgrad.model_view import ModelView, Replay, batch_size, select_rows
from natgrad.optim.layout import JointLayout
from natgrad.optim.settings import Subsets
from natgrad.optim.static import StaticInputs


@dataclass
class Tape:
    """What is kept of one chunk of curvature rows until the update is accepted."""

    inputs: Any
    targets: Any
    replay: Replay
    layer_inputs: dict[str, Tensor]
    z: Float[Tensor, "rows ..."]
    derivative: Float[Tensor, "rows ..."]  # of the summed nll with respect to z
    nll: Float[Tensor, ""]  # summed
    count: Float[Tensor, ""]


@dataclass
class Evaluation:
    """The mean loss and its gradient over the whole batch, and the curvature rows' statistics and tapes."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " size"]
    statistics: Statistics | None
    tapes: list[Tape]
    count: Float[Tensor, ""]
    rows: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # (a, g) per chunk: the low-rank form


@dataclass
class Evaluator:
    """Evaluates batches of one model.

    Args:
        view: the model.
        likelihood: p(y | z).
        capture: of the covered layers.
        layout: of flat vectors.
        static: inputs that are the same at every update, or None.
        diagonal: names of parameters outside of the layers whose diagonal of F is estimated too.
        checked: whether a batch was compared with what model and likelihood expect; done once.
    """

    view: ModelView
    likelihood: Likelihood
    capture: Capture
    layout: JointLayout
    static: StaticInputs | None = None
    diagonal: tuple[str, ...] = ()  # uncovered parameters whose diagonal Fisher is estimated
    checked: bool = False

    def __call__(
        self,
        batches: Iterable[tuple[Any, Any]],
        subsets: Subsets,
        generator: torch.Generator,
        into: Float[Tensor, " size"],
        keep_rows: bool = False,
    ) -> Evaluation:
        """Loss, gradient (written to ``into``), statistics and tapes.

        Args:
            batches: (inputs, targets) micro-batches of one batch.
            subsets: the shares τ₁ and τ₂.
            generator: the source of the subsets and of the sampled targets.
            into: a flat buffer that receives the gradient of the mean loss, without the l2 term.
            keep_rows: keep every a and g of the batch for the low-rank form.
        """
        into.zero_()
        total = torch.zeros((), dtype=into.dtype, device=into.device)
        count = torch.zeros_like(total)
        statistics: Statistics | None = None
        tapes: list[Tape] = []
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for inputs, targets in batches:
            for chunk_inputs, chunk_targets, sampled_rows in self._split(inputs, targets, subsets, generator):
                replay = self.view.snapshot() if sampled_rows else None
                with torch.enable_grad(), self.view.curvature_pass(), self.capture.record() as record:
                    z = self.view(chunk_inputs)
                if not self.checked:
                    check_captured(record, z)
                    validate_targets(self.likelihood, z.detach(), chunk_targets)
                derivative, nll, chunk_count = self._loss(z, chunk_targets)
                gradients = self._accumulate(record, z, derivative, into, retain=bool(sampled_rows))
                total += nll
                count += chunk_count
                if keep_rows:
                    for name, found in record.inputs.items():
                        pairs = zip(found, gradients[name], strict=True)
                        rows.setdefault(name, []).extend((flatten_rows(a), flatten_rows(g)) for a, g in pairs)
                if sampled_rows and replay is not None:
                    new = self._statistics(record, z, chunk_inputs, chunk_targets, sampled_rows, generator)
                    statistics = new if statistics is None else statistics + new
                    layer_inputs = {name: found[0].detach() for name, found in record.inputs.items() if len(found) == 1}
                    tapes.append(
                        Tape(
                            chunk_inputs, chunk_targets, replay, layer_inputs, z.detach(), derivative, nll, chunk_count
                        )
                    )
                del record, z
        into /= count
        self.checked = True
        return Evaluation(total / count, into, statistics, tapes, count, rows)

    def _statistics(
        self, record: Record, z: Tensor, inputs: Any, targets: Any, rows: int, generator: torch.Generator
    ) -> Statistics:
        """Of the leading rows of a chunk: Kronecker factors, and the diagonal where it is wanted."""
        statistics = statistics_from(
            record,
            z,
            self.likelihood,
            rows=rows,
            targets=targets,
            generator=generator,
            input_factors=self.static.factors(record, inputs) if self.static is not None else None,
        )
        if self.diagonal:
            leading = slice(0, rows)
            squares = squared_gradients(
                self.view,
                self.likelihood,
                select_rows(inputs, leading),
                self.diagonal,
                expectation="sampled",
                y=select_rows(targets, leading),
                generator=generator,
            )
            for name, square in squares.items():  # diag(F) as a block diag(d) ⊗ 1
                statistics.layers[name] = LayerSums(square.flatten(), square.new_full((1,), rows), rows)
        return statistics

    def _split(
        self, inputs: Any, targets: Any, subsets: Subsets, generator: torch.Generator
    ) -> Iterator[tuple[Any, Any, int]]:
        """The curvature rows, then the rest: (inputs, targets, number of leading rows that get sampled targets)."""
        size = batch_size(inputs)
        sampled, wanted = subsets.rows(size)
        if couples_examples(self.view.module):
            wanted = size
        if wanted >= size:
            yield inputs, targets, sampled
            return
        order = torch.randperm(size, generator=generator, device=generator.device)
        first, rest = order[:wanted], order[wanted:]
        yield select_rows(inputs, first), select_rows(targets, first), sampled
        yield select_rows(inputs, rest), select_rows(targets, rest), 0

    def _loss(self, z: Tensor, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(d nll / dz, nll, count) of the summed nll."""
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            nll = self.likelihood.nll(leaf, targets, count=1)
        (derivative,) = torch.autograd.grad(nll, leaf)
        return derivative, nll.detach(), torch.as_tensor(self.likelihood.count(leaf.detach(), targets), device=z.device)

    def _accumulate(
        self, record: Record, z: Tensor, cotangent: Tensor, into: Tensor, *, retain: bool
    ) -> dict[str, list[Tensor]]:
        """Add this chunk's gradient of the summed nll to ``into``; returns the g's."""
        others = self.layout.others(into)
        other_parameters = [self.view.parameters[name] for name in others]
        gradients, other_gradients = record.gradients(z, cotangent, parameters=other_parameters, retain_graph=retain)
        for name, block in self.layout.blocks(into).items():
            for a, g in zip(record.inputs[name], gradients[name], strict=True):
                a, g = flatten_rows(a), flatten_rows(g)
                weight, bias = trainable_parts(record.layers[name])
                if weight:
                    block[:, : a.shape[-1]].addmm_(g.T, a)
                if bias:
                    block[:, -1].add_(g.sum(0))
        for part, gradient in zip(others.values(), other_gradients, strict=True):
            if gradient is not None:
                part.add_(gradient)
        return gradients
