r"""Statistics of the empirical Fisher without a backward pass of their own: the loss's backward pass makes the g's.

The loss may be ``c · Σ nll`` for any c that is the same for all examples: one over a count, over the number of
micro-batches, times the scale of a ``GradScaler``. c is what the derivative at z is of ``d(Σ nll)/dz``; the derivatives
that reach the layers are divided by it, so that no scale of the loss changes the curvature.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import Statistics, to_dense
from natgrad.curvature.cotangents import cotangents
from natgrad.curvature.ekfac import GradientSquares
from natgrad.curvature.inverse import Eigenbasis
from natgrad.curvature.layer_sums import add_outputs, input_sums, leading_examples, leading_use
from natgrad.layers.capture import Record
from natgrad.layers.passing import Passing
from natgrad.layers.rules import DiagonalRule
from natgrad.likelihoods import Likelihood

# The derivative at z may differ from c d(Σ nll)/dz by this share (half precision rounds, other losses differ by more).
_TOLERANCE = 0.05
# ... or by so many units in the last place of numbers of order one.
_ROUNDING = 64.0


class LossStatistics:
    """Sums of one batch that are complete when the loss's backward pass has gone through its layers.

    Args:
        record: of the forward pass; the inputs are summed at once.
        z: its output.
        likelihood: p(y | z); the loss has to be proportional to its nll.
        targets: y.
        weight: per-target weights of the loss.
        bases: of layers whose squared per-example gradients are summed too, in that basis.
        share: of the examples, the first ones, that the sums are made of; they stand for the whole batch.
    """

    def __init__(
        self,
        record: Record,
        z: Float[Tensor, "batch ..."],
        likelihood: Likelihood,
        *,
        targets: Any,
        weight: Tensor | None = None,
        bases: Mapping[str, Eigenbasis] | None = None,
        share: float = 1.0,
    ) -> None:
        self._batch, self._blocks = z.shape[0], record.blocks
        self._rows = math.ceil(share * self._batch)
        wide = z.detach().to(torch.promote_types(z.dtype, torch.float32))
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            how = {"expectation": "empirical", "targets": targets, "weight": weight}
            (self._expected,) = (stack[0] for stack in cotangents(likelihood, wide, **how))
            self._uses = {
                name: [
                    leading_use(record.blocks[name], use, self._rows, self._batch, apart=name in (bases or ()))
                    for use in found
                ]
                for name, found in record.uses.items()
            }
            self._sums = {
                name: input_sums(block, self._uses.get(name, []), self._rows) for name, block in record.blocks.items()
            }
            self._squares = GradientSquares(record.blocks, self._uses, bases, self._rows) if bases else None
            for name, total in self._squares.sums.items() if self._squares is not None else ():
                self._sums[name].squares = total
        self._missing = {
            name: {i for i, edge in enumerate(edges) if edge is not None} for name, edges in record.edges.items()
        }
        self._outputs = {name: [use.output_shape for use in uses] for name, uses in self._uses.items()}
        self._gradients: dict[str, dict[int, Tensor | None]] = {name: {} for name in self._uses}
        self._scale: Tensor | None = None
        self._proportional: Tensor | None = None
        self._passing: Passing | None = Passing(record, z, self._at_output, self._at_layer)

    @property
    def complete(self) -> bool:
        """Whether a backward pass went through all layers."""
        return not any(self._missing.values())

    def drop(self) -> None:
        """Forget the batch; hooks go off the graph."""
        if self._passing is not None:
            self._passing.remove()
        self._passing = None
        self._uses, self._gradients, self._squares = {}, {}, None

    def statistics(self) -> Statistics:
        """The sums, of the gradients of ``Σ nll``.

        Sums are NaN where the loss is not proportional to the likelihood's nll, which on the CPU is an error.

        Raises:
            RuntimeError: no backward pass went through z, or not through every layer; a layer is named.
            ValueError: the loss is not proportional to the nll of the likelihood.
        """
        self.drop()
        if self._scale is None or self._proportional is None:
            raise RuntimeError(
                "expectation='empirical' reads the derivatives of the layers' outputs off loss.backward(): call "
                "observe(z, y), then backward() of a loss that is computed from z, then step()"
            )
        for name, missing in self._missing.items():
            if missing:
                raise RuntimeError(
                    f"layer {name!r}: loss.backward() did not reach its output; expectation='empirical' needs one "
                    "whole backward pass (no inputs=, no torch.autograd.grad for some parameters only)"
                )
        if self._proportional.device.type == "cpu" and not self._proportional and torch.isfinite(self._scale):
            raise ValueError(
                "the loss is not proportional to likelihood.nll(z, y): with expectation='empirical' its derivatives "
                "are those of the curvature. Pass the likelihood of the loss (natgrad.likelihood_of), the same weight= "
                "to observe(), or use expectation='sampled'"
            )
        factor = torch.where(self._proportional, 1 / self._scale.square(), torch.nan)
        for name, sums in self._sums.items():
            one_sided = to_dense(sums.A if isinstance(self._blocks[name].rule, DiagonalRule) else sums.G)
            one_sided.mul_(factor.to(one_sided.dtype))
            if sums.squares is not None:
                sums.squares.mul_(factor.to(sums.squares.dtype))
        return Statistics(self._sums, float(self._rows), float(self._rows), True).standing_for(self._batch)

    @torch.no_grad()
    def _at_output(self, gradient: Tensor | None) -> None:
        d = self._expected
        found = torch.zeros_like(d) if gradient is None else gradient.to(d.dtype)
        length = (d * d).sum()
        scale = (found * d).sum() / length
        rest = (found - scale * d).square().sum()
        rounding = scale.square() * d.numel() * (_ROUNDING * torch.finfo(d.dtype).eps) ** 2
        allowed = _TOLERANCE**2 * found.square().sum() + rounding
        nothing = (length == 0) & (found == 0).all()  # every target is ignored: nothing reaches the layers either
        self._scale = torch.where(nothing, 1.0, scale)
        self._proportional = nothing | ((rest <= allowed) & (scale > 0) & torch.isfinite(scale))

    @torch.no_grad()
    def _at_layer(self, name: str, call: int, gradient: Tensor | None) -> None:
        if call not in self._missing[name]:
            return  # a further backward pass through the same graph
        self._missing[name].discard(call)
        self._gradients[name][call] = gradient
        if not self._missing[name]:
            self._reduce(name)

    def _reduce(self, name: str) -> None:
        """All derivatives of one layer are there: sum them up and let them go."""
        found, sums, uses = self._gradients.pop(name), self._sums[name], self._uses[name]
        like = to_dense(sums.A)
        gs = [
            g if (g := found.get(i)) is not None else like.new_zeros(shape)
            for i, shape in enumerate(self._outputs[name])
        ]
        with torch.autocast(like.device.type, enabled=False):
            if self._rows < self._batch:  # rows whose examples cannot be told apart are all there, and count less
                gs = [
                    g
                    if (share := leading_examples(use.gradient(g), self._rows, self._batch)[1]) == 1
                    else g * share**0.5
                    for use, g in zip(uses, gs, strict=True)
                ]
            add_outputs(sums, self._blocks[name], uses, gs, self._rows, self._batch)
            if self._squares is not None:
                self._squares.add({name: gs})
        self._uses[name] = []
        if self.complete:
            self.drop()
