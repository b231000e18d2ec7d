"""The exact quadratic model and the exact loss on the curvature rows.

``δᵀ F δ = (1/count) Σ_n (J_n δ)ᵀ F_R(z_n) (J_n δ)``: inner products with F need Jacobian-vector products only [KFAC,
app. C].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.likelihoods import Likelihood, nll_and_score
from natgrad.model_view import ModelView
from natgrad.operators.chain import Chain
from natgrad.operators.linearize import jacobian_products
from natgrad.optim.evaluation import Rows, Tape
from natgrad.optim.layout import JointLayout
from natgrad.quadratic import Subspace


@dataclass
class LocalModel:
    """M(δ) and h(θ + δ) around the present parameters, on the rows that a batch's tapes hold."""

    view: ModelView
    likelihood: Likelihood
    layout: JointLayout
    chain: Chain | None
    l2: float = 0.0

    def subspaces(
        self,
        tapes: Sequence[Tape],
        products: Float[Tensor, "1_plus_k k"],
        directions: list[Float[Tensor, " size"]],
        damping: Tensor,
    ) -> tuple[Subspace, Subspace]:
        """M over the span of some directions, twice: with the slope of the whole batch, and with that of the rows.

        The first gives the best coefficients, the second the predicted change that ρ compares with the actual one: both
        of ρ's numbers then come from the same rows [KFAC, sec. 6.4, 6.5, 7].

        Args:
            tapes: the curvature rows.
            products: inner products (:meth:`JointLayout.inner_products`) of ∇h of the whole batch, l2 term included,
                and of every d_i, with all d_i.
            directions: flat vectors d_i.
            damping: λ + η.
        """
        fisher, slope_rows = self._on_rows(tapes, lambda tape: self._tangents(tape, directions))
        slope, gram = products[0], products[1:]
        curvature = fisher + damping * gram
        if self.l2:
            slope_rows = slope_rows + self.l2 * torch.stack([self._dot_parameters(d) for d in directions]).double()
        return Subspace(slope, curvature, gram), Subspace(slope_rows, curvature, gram)

    def parts(
        self,
        tapes: Sequence[Tape],
        gradient: Float[Tensor, " size"],
        direction: Float[Tensor, " size"],
        damping: Tensor,
    ) -> Subspace:
        """M over the span of a direction's parts: that of each layer, and that of the parameters that no block holds.

        Args:
            tapes: the curvature rows.
            gradient: ∇h of the whole batch, l2 term included.
            direction: d.
            damping: λ + η.
        """
        segments = self.layout.segments
        slope = torch.stack([torch.dot(gradient[where], direction[where]) for where in segments]).double()
        squares = torch.stack([torch.dot(direction[where], direction[where]) for where in segments]).double()
        fisher, _ = self._on_rows(tapes, lambda tape: self._part_tangents(tape, direction))
        return Subspace(slope, fisher + torch.diag(damping * squares))

    def penalty(self) -> Float[Tensor, ""]:
        """``η/2 ‖θ‖²``."""
        zero = torch.zeros((), dtype=torch.float64, device=self.view.device)
        if not self.l2:
            return zero
        squares = [parameter.square().sum() for parameter in self.view.parameters.values()]
        return zero + 0.5 * self.l2 * torch.stack(squares).sum()

    def trial(self, tapes: Sequence[Tape], terms: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
        """h(θ + Σ c d) on the curvature rows for terms (c, d); the parameters are put back bit for bit."""
        parameters = self.view.parameters
        old = {name: parameter.clone() for name, parameter in parameters.items()}
        for coefficient, direction in terms:
            for name, part in self.layout.parameters(direction).items():
                parameters[name].addcmul_(part, coefficient.to(part.dtype))
        value = self.losses(tapes)[0] + self.penalty()
        for name, parameter in parameters.items():
            parameter.copy_(old[name])
        return value

    def losses(self, *groups: Sequence[Rows]) -> list[Float[Tensor, ""]]:
        """The mean nll of each group of rows at the present parameters, with the dropout masks of then; 0 of none."""
        chunks = [chunk for group in groups for chunk in group]
        if self.chain is not None and all(isinstance(chunk.inputs, Tensor) for chunk in chunks):
            z = self.view(torch.cat([chunk.inputs for chunk in chunks]))  # nothing is random: one pass serves all
            outputs = list(z.split([len(chunk.inputs) for chunk in chunks]))
        else:
            outputs = [self._again(chunk) for chunk in chunks]
        found = iter(outputs)
        return [
            mean_nll(group, [nll_and_score(self.likelihood, next(found), chunk.targets)[0] for chunk in group])
            for group in groups
        ]

    def _again(self, chunk: Rows) -> Tensor:
        with chunk.replay:
            return self.view(chunk.inputs)

    def _on_rows(
        self, tapes: Sequence[Tape], tangents_of: Callable[[Tape], list[Tensor]]
    ) -> tuple[Float[Tensor, "k k"], Float[Tensor, " k"]]:
        """``d_iᵀ F d_j`` and ``∇h · d_i`` (without the l2 term) on the curvature rows, from their tangents."""
        count = torch.stack([tape.count.to(torch.float64) for tape in tapes]).sum()
        fisher: Tensor | float = 0.0
        slope: Tensor | float = 0.0
        for tape in tapes:
            tangents = tangents_of(tape)
            fisher = fisher + _fisher_gram(self.likelihood, tape, tangents)
            slope = slope + torch.stack([torch.sum(tape.derivative * tangent) for tangent in tangents]).double()
        return fisher / count, slope / count

    def _tangents(self, tape: Tape, directions: Sequence[Tensor]) -> list[Tensor]:
        if self.chain is not None and tape.layer_inputs:
            pairs = [_weights_and_biases(self.chain, self.layout.blocks(direction)) for direction in directions]
            return [tangent.view_as(tape.z) for tangent in self.chain.tangents(tape.layer_inputs, pairs)]
        with tape.replay:
            views = [self.layout.parameters(direction) for direction in directions]
            return jacobian_products(self.view, tape.inputs, views)[1]

    def _part_tangents(self, tape: Tape, direction: Tensor) -> list[Tensor]:
        """``J d_l`` for the part d_l of a direction in each segment of the layout."""
        if self.chain is not None and tape.layer_inputs:  # a layer's tangent starts at the layer
            pairs = _weights_and_biases(self.chain, self.layout.blocks(direction))
            alone = [{name: pair} for name, pair in pairs.items()]
            return [tangent.view_as(tape.z) for tangent in self.chain.tangents(tape.layer_inputs, alone)]
        found, part = [], self.layout.zeros()
        for where in self.layout.segments:  # one after another: their number times all parameters may be too much
            part[where] = direction[where]
            found += self._tangents(tape, [part])
            part[where] = 0
        return found

    def _dot_parameters(self, direction: Tensor) -> Tensor:
        """θ · d."""
        parts = self.layout.parameters(direction)
        return torch.stack([torch.sum(self.view.parameters[name] * part) for name, part in parts.items()]).sum()


def _weights_and_biases(chain: Chain, blocks: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The columns of W and of b in each layer's ``[W b]``."""
    return {
        name: (block[:, : layer.in_features], block[:, -1] if layer.bias is not None else None)
        for (name, block), layer in zip(blocks.items(), chain.layers, strict=True)
    }


def mean_nll(rows: Sequence[Rows], sums: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The mean over chunks of rows from the sum of each; 0 of no chunk."""
    if not rows:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([nll.double() for nll in sums]).sum() / sum(chunk.count for chunk in rows)


def _fisher_gram(likelihood: Likelihood, tape: Tape, tangents: Sequence[Tensor]) -> Float[Tensor, "k k"]:
    """``Σ_n t_i(n)ᵀ w_n F_R(z_n) t_j(n)`` for all pairs of tangents."""
    weigh = getattr(likelihood, "curvature_weight", None)
    weight = weigh(tape.z, tape.targets) if weigh is not None else None
    rows = []
    for i, left in enumerate(tangents):
        product = likelihood.fisher_product(tape.z, left)
        if weight is not None:
            product = product * weight
        rows.append([torch.sum(product * right) for right in tangents[: i + 1]])
    return _symmetric(rows)


def _symmetric(lower: Sequence[Sequence[Tensor]]) -> Float[Tensor, "k k"]:
    """The symmetric matrix of a lower triangle of 0-d tensors, in float64."""
    size = len(lower)
    entries = [lower[max(i, j)][min(i, j)] for i in range(size) for j in range(size)]
    return torch.stack(entries).view(size, size).double()
