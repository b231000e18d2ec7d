"""Loss, gradient and curvature statistics of a batch, in one walk over its chunks.

Curvature is estimated from τ₂ m rows, the first τ₁ m of those serve the factors [KFAC, sec. 8]. In a plain chain of
layers their derivatives are taken by hand, from a forward pass that all rows share. In any other model they form a
chunk of their own, whose single forward pass serves the gradient, the backward pass with sampled targets and the
linearised pass; the other rows see nothing but the gradient.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.base import LayerSums, Statistics
from natgrad.curvature.cotangents import validate_targets
from natgrad.curvature.inverse import Eigenbasis
from natgrad.curvature.kfac import check_captured, statistics_from, trainable_parts
from natgrad.curvature.uncovered import couples_examples, squared_gradients
from natgrad.layers.capture import Capture, Record
from natgrad.layers.factors import flatten_rows
from natgrad.likelihoods import Likelihood, is_plain_sum, nll_and_score
from natgrad.model_view import ModelView, Replay, batch_size, select_rows
from natgrad.operators.chain import Chain, ChainRecord
from natgrad.optim.inverses import LayerInverses
from natgrad.optim.layout import JointLayout
from natgrad.optim.rotations import rotate_rows
from natgrad.optim.settings import Subsets
from natgrad.optim.static import StaticInputs


@dataclass
class Rows:
    """A chunk of rows whose loss is evaluated again after the update, and what it was before."""

    inputs: Any
    targets: Any
    replay: Replay | AbstractContextManager[None]
    nll: Float[Tensor, ""]  # summed
    count: Float[Tensor, ""]


@dataclass
class Tape(Rows):
    """What is kept of one chunk of curvature rows until the update is accepted."""

    layer_inputs: dict[str, Tensor]
    z: Float[Tensor, "rows ..."]
    derivative: Float[Tensor, "rows ..."]  # of the summed nll with respect to z


@dataclass
class Evaluation:
    """The mean loss and its gradient over the whole batch, the curvature rows' statistics and tapes, rows held out."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " size"]
    count: Float[Tensor, ""]
    statistics: Statistics = field(default_factory=Statistics)
    tapes: list[Tape] = field(default_factory=list)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # (a, g) per chunk: the low-rank form
    held_out: list[Rows] = field(default_factory=list)  # no part of the curvature rows


@dataclass
class _Pass:
    """A recorded forward pass."""

    record: Record
    z: Tensor
    inputs: Any
    targets: Any
    replay: Replay | AbstractContextManager[None] | None = None
    curvature: bool = False  # whether F is estimated from these rows
    sampled: int = 0  # so many leading rows get sampled targets
    gradient: bool = True  # whether the rows add to loss and gradient
    held_out: bool = False
    keep: Tensor | None = None  # of a chain: rows whose layer inputs are wanted after the backward pass


@dataclass
class Evaluator:
    """Evaluates batches of one model.

    Args:
        view: the model.
        likelihood: p(y | z).
        capture: of the covered layers.
        layout: of flat vectors.
        chain: the model as a chain, if it is one.
        static: inputs that are the same at every update, or None.
        diagonal: names of parameters outside of the layers whose diagonal of F is estimated too.
        inverses: they know in which eigenbases second moments of the gradient are wanted, and which cross factors.
        checked: whether a batch was compared with what model and likelihood expect; done once.
        rotations: linear layers whose gradient is wanted as ``Q_Gᵀ ∇h Q_A``: the rows a and g are rotated, which
            takes less than rotating the gradient where there are fewer of them than rows or columns in it.
    """

    view: ModelView
    likelihood: Likelihood
    capture: Capture
    layout: JointLayout
    chain: Chain | None = None
    static: StaticInputs | None = None
    diagonal: tuple[str, ...] = ()  # uncovered parameters whose diagonal Fisher is estimated
    checked: bool = False
    inverses: LayerInverses | None = None
    rotations: Mapping[str, Eigenbasis] = field(default_factory=dict)

    def __call__(
        self,
        batches: Sequence[tuple[Any, Any]],
        subsets: Subsets | None,
        generator: torch.Generator,
        into: Float[Tensor, " size"] | None = None,
        keep_rows: bool = False,
        held_out: bool = False,
        observe: bool = True,
    ) -> Evaluation:
        """Loss, gradient, statistics and tapes.

        Args:
            batches: (inputs, targets) micro-batches of one batch.
            subsets: the shares τ₁ and τ₂; None where only loss and gradient are wanted.
            generator: the source of the subsets and of the sampled targets.
            into: a flat buffer that receives the gradient of the mean loss, without the l2 term. None: a new one, made
                when the first backward pass begins: the forward pass and the loss then have that much less beside them.
            keep_rows: keep every a and g of the batch for the low-rank form.
            held_out: also hold out as many rows as there are curvature rows, where the batch has that many more.
            observe: False leaves the statistics empty.
        """
        zero = self.layout.empty().new_zeros(())
        found = Evaluation(zero, zero if into is None else into, zero.clone())
        examples = sum(batch_size(inputs) for inputs, _ in batches)
        first = True
        for inputs, targets in batches:
            for part in self._passes(inputs, targets, subsets, generator, held_out):
                part = part if observe else replace(part, sampled=0)
                self._take(part, found, examples, generator, keep_rows=keep_rows, first=first)
                first = False
                del part  # and what it holds, before the next pass is made
        found.gradient /= found.count
        found.loss /= found.count
        self.checked = True
        return found

    def _take(
        self,
        part: _Pass,
        found: Evaluation,
        examples: int,
        generator: torch.Generator,
        *,
        keep_rows: bool,
        first: bool,
    ) -> None:
        """Add what a pass contributes to the sums in ``found``; ``first``: the gradient holds nothing yet."""
        if not self.checked:
            check_captured(part.record, part.z)
            validate_targets(self.likelihood, part.z.detach(), part.targets)
        known = self.static.factors(part.record, part.inputs) if self.static is not None else None
        nll, derivative = nll_and_score(self.likelihood, part.z, part.targets)
        count = torch.as_tensor(self.likelihood.count(part.z.detach(), part.targets), device=nll.device)
        plain_sum = is_plain_sum(self.likelihood)  # counts 1 for a batch of any size: some rows count for their share
        if plain_sum:
            count = count * (batch_size(part.inputs) / examples)
        if part.gradient:
            if isinstance(part.record, ChainRecord) and part.replay is None:
                part.z = derivative  # as large, and not needed any more
            if not found.gradient.ndim:
                found.gradient = self.layout.empty()
            self._accumulate(part, derivative, found, add=not first, keep_rows=keep_rows)
            found.loss += nll
            found.count += count
        if part.replay is None:
            return
        again = part.inputs, part.targets, part.replay, nll, count
        if part.held_out:
            found.held_out.append(Rows(*again))
        if part.sampled:
            new = self._statistics(part, known, generator)
            if plain_sum:
                new = replace(new, count=new.count * (part.sampled / examples), additive=True)
            found.statistics = found.statistics + new if found.tapes else new
        if part.curvature:
            layer_inputs = dict(part.record.layer_inputs) if isinstance(part.record, ChainRecord) else {}
            found.tapes.append(Tape(*again, layer_inputs, part.z.detach(), derivative))

    def _passes(
        self, inputs: Any, targets: Any, subsets: Subsets | None, generator: torch.Generator, held_out: bool
    ) -> Iterator[_Pass]:
        """Forward passes that hold every row once for the gradient, and the curvature rows together."""
        size = batch_size(inputs)
        sampled, wanted = (0, 0) if subsets is None else subsets.rows(size)
        checked = min(wanted, size - wanted) if held_out else 0
        if self.chain is not None:
            replay = nullcontext()  # nothing is random in a chain
            record, z = self._forward(inputs, graph=False)
            if self.chain.fits(z):
                record = ChainRecord(self.chain, {name: calls[0] for name, calls in record.inputs.items()})
                if not wanted:
                    yield _Pass(record, z, inputs, targets)
                    return
                if wanted >= size:
                    yield _Pass(record, z, inputs, targets, replay, True, sampled)
                    return
                order = torch.randperm(size, generator=generator, device=generator.device)
                chosen, others = order[:wanted], order[wanted : wanted + checked]
                z_chosen, z_others, whole = z[chosen], z[others], [_Pass(record, z, inputs, targets, keep=chosen)]
                del z
                yield whole.pop()  # who takes it can let go of what is in it
                x, y = _select_both(inputs, targets, chosen)
                record = ChainRecord(self.chain, record.kept)
                yield _Pass(record, z_chosen, x, y, replay, True, sampled, gradient=False)
                if checked:
                    x, y = _select_both(inputs, targets, others)
                    nothing = ChainRecord(self.chain, {})
                    yield _Pass(nothing, z_others, x, y, replay, gradient=False, held_out=True)
                return
        if not wanted:
            yield _Pass(*self._forward(inputs), inputs, targets)
            return
        if wanted >= size or couples_examples(self.view.module):
            replay = self.view.snapshot()
            yield _Pass(*self._forward(inputs), inputs, targets, replay, True, sampled)
            return
        order = torch.randperm(size, generator=generator, device=generator.device)
        x, y = _select_both(inputs, targets, order[:wanted])
        replay = self.view.snapshot()
        yield _Pass(*self._forward(x), x, y, replay, True, sampled)
        if checked:
            x, y = _select_both(inputs, targets, order[wanted : wanted + checked])
            replay = self.view.snapshot()
            yield _Pass(*self._forward(x), x, y, replay, held_out=True)
        if wanted + checked < size:
            x, y = _select_both(inputs, targets, order[wanted + checked :])
            yield _Pass(*self._forward(x), x, y)

    def _forward(self, inputs: Any, *, graph: bool = True) -> tuple[Record, Tensor]:
        with torch.set_grad_enabled(graph), self.view.curvature_pass(once=True), self.capture.record() as record:
            return record, self.view(inputs)

    def _statistics(self, part: _Pass, known: dict[str, Tensor] | None, generator: torch.Generator) -> Statistics:
        """Of the leading rows of a pass: Kronecker factors, and the diagonal where it is wanted."""
        order = self.inverses.order(part.record, part.z) if self.inverses is not None else ()
        statistics = statistics_from(
            part.record,
            part.z,
            self.likelihood,
            rows=part.sampled,
            targets=part.targets,
            generator=generator,
            input_factors=known,
            bases=self.inverses.bases if self.inverses is not None else None,
            order=order,
            coupled=couples_examples(self.view.module),
            keep_rows=not order,
        )
        if self.diagonal:
            leading = slice(0, part.sampled)
            squares = squared_gradients(
                self.view,
                self.likelihood,
                select_rows(part.inputs, leading),
                self.diagonal,
                expectation="sampled",
                y=select_rows(part.targets, leading),
                generator=generator,
            )
            for name, square in squares.items():  # diag(F) as a block diag(d) ⊗ 1
                ones = square.new_full((1,), part.sampled)
                statistics.layers[name] = LayerSums(square.flatten(), ones, part.sampled)
        return statistics

    def _accumulate(self, part: _Pass, cotangent: Tensor, found: Evaluation, *, add: bool, keep_rows: bool) -> None:
        """Write this pass's gradient of the summed nll, or add it; keep its (a, g) where they are asked for."""
        into = found.gradient
        matrices = self.layout.blocks(into)
        if isinstance(part.record, ChainRecord):
            last = part.replay is None  # nothing else is asked of these rows
            for name, a, g in part.record.layerwise(cotangent, consume=last and not keep_rows, keep=part.keep):
                _add_products(part.record.layers[name], [(a, g)], matrices[name], self.rotations.get(name), add=add)
                if keep_rows:
                    found.rows.setdefault(name, []).append((flatten_rows(a), flatten_rows(g)))
            return
        by_hand = {name: b for name, b in part.record.blocks.items() if b.rule.by_hand}
        targets = self.layout.parameters(into)
        own = {member for block in by_hand.values() for member in block.members.values()}
        others = {name: target for name, target in targets.items() if name not in own}
        other_parameters = [self.view.parameters[name] for name in others]
        gradients, other_gradients = part.record.gradients(
            part.z, cotangent, parameters=other_parameters, retain_graph=bool(part.sampled)
        )
        inputs = part.record.inputs
        for name in by_hand:
            pairs = zip(inputs.get(name, []), gradients.get(name, []), strict=True)
            _add_products(part.record.layers[name], pairs, matrices[name], self.rotations.get(name), add=add)
        for target, gradient in zip(others.values(), other_gradients, strict=True):
            if not add:
                target.zero_()
            if gradient is not None:
                target.add_(gradient)
        if keep_rows:
            _keep_rows(part.record, gradients, found.rows)


def _add_products(
    layer: nn.Linear, pairs: Iterable[tuple[Tensor, Tensor]], into: Tensor, basis: Eigenbasis | None, *, add: bool
) -> None:
    """Write ``Σ g āᵀ`` over the calls of a linear layer to its block ``[W b]``, or add it; in a basis if given."""
    weight, bias = trainable_parts(layer)
    beta = float(add)  # at 0 what was there does not matter, not even if it is not finite
    for a, g in pairs:
        a, g = flatten_rows(a), flatten_rows(g)
        if basis is not None and basis.QG is not None:
            g = rotate_rows(g, basis.QG).to(into.dtype)
        if basis is not None and basis.QA is not None:
            into.addmm_(g.T, rotate_rows(a, basis.QA, ones=bias).to(into.dtype), beta=beta)
            beta = 1.0
            continue
        if weight:
            into[:, : a.shape[-1]].addmm_(g.T, a, beta=beta)
        if bias:
            into[:, -1].add_(g.sum(0)) if beta else torch.sum(g, 0, out=into[:, -1])
        beta = 1.0
    if not beta:
        into.zero_()


def _select_both(inputs: Any, targets: Any, rows: Tensor) -> tuple[Any, Any]:
    """Rows of inputs and targets; of one tensor that is both, once."""
    x = select_rows(inputs, rows)
    return x, x if targets is inputs else select_rows(targets, rows)


def _keep_rows(
    record: Record, gradients: dict[str, list[Tensor]], into: dict[str, list[tuple[Tensor, Tensor]]]
) -> None:
    """Append (a, g) of every call."""
    for name, found in record.inputs.items():
        if not record.blocks[name].rule.by_hand:
            continue
        pairs = zip(found, gradients[name], strict=True)
        into.setdefault(name, []).extend((flatten_rows(a), flatten_rows(g)) for a, g in pairs)
