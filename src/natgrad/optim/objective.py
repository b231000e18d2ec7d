"""h(θ) on fixed batches, and its curvature: what a step evaluates again and again that looks beyond the gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.likelihoods import Likelihood, is_plain_sum, nll_and_score
from natgrad.model_view import ModelView, batch_size, select_rows
from natgrad.operators.autodiff import Fisher, GaussNewton
from natgrad.operators.base import LinearOperator
from natgrad.replay import Replay

Curvature = Literal["gauss_newton", "metric"]


@dataclass
class _Chunk:
    inputs: Any
    targets: Any
    replay: Replay


@dataclass
class Objective:
    """``h(θ) = nll + η/2 ‖θ‖²`` on some batches, with the same dropout masks and buffers at every evaluation.

    Args:
        view: the model.
        likelihood: p(y|z).
        batches: (inputs, targets) micro-batches, taken together.
        l2: η.
    """

    view: ModelView
    likelihood: Likelihood
    batches: Sequence[tuple[Any, Any]]
    l2: float = 0.0
    _chunks: list[_Chunk] = field(default_factory=list, init=False)

    def first(self) -> tuple[Float[Tensor, ""], Float[Tensor, " P"], list[Tensor]]:
        """The evaluation at θ that running statistics see: nll, ∇h, and the output z of every micro-batch."""
        self._chunks = []
        outputs: list[Tensor] = []

        def forward(x: Any, y: Any) -> Tensor:
            self._chunks.append(_Chunk(x, y, self.view.snapshot()))
            outputs.append(self.view(x))
            return outputs[-1]

        nll, gradient = self._differentiate([(lambda x=x, y=y: forward(x, y), y) for x, y in self.batches])
        return nll, gradient, [z.detach() for z in outputs]

    @torch.no_grad()
    def at(self, offset: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """h(θ + offset), in float64 where the device has it; the parameters are put back."""
        with self.displaced(offset):
            sums, counts = [], []
            for chunk in self._known():
                with chunk.replay:
                    z = self.view(chunk.inputs)
                sums.append(nll_and_score(self.likelihood, z, chunk.targets)[0].to(_real(z)))
                counts.append(self._count(z, chunk.targets))
            return torch.stack(sums).sum() / self._total(counts) + self.penalty()

    def gradient_at(self, offset: Float[Tensor, " P"]) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """h and ∇h at θ + offset; the parameters are put back."""
        with self.displaced(offset):
            pieces = [(lambda chunk=chunk: self._again(chunk), chunk.targets) for chunk in self._known()]
            nll, gradient = self._differentiate(pieces)
            return nll + self.penalty(), gradient

    def penalty(self) -> Float[Tensor, ""]:
        """``η/2 ‖θ‖²`` at the present parameters."""
        first = next(iter(self.view.parameters.values()))
        total = torch.zeros((), dtype=_real(first), device=first.device)
        if self.l2:
            squares = [p.detach().square().sum().to(total.dtype) for p in self.view.parameters.values()]
            total = 0.5 * self.l2 * torch.stack(squares).sum()
        return total

    @contextmanager
    def displaced(self, offset: Float[Tensor, " P"]) -> Iterator[None]:
        """The parameters moved by an offset within the block, and back bit for bit whatever happens there."""
        parameters = self.view.parameters
        before = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            with torch.no_grad():
                for name, part in self.view.to_dict(offset).items():
                    parameters[name].add_(part)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)

    def _known(self) -> list[_Chunk]:
        if not self._chunks:
            self._chunks = [_Chunk(x, y, self.view.snapshot()) for x, y in self.batches]
        return self._chunks

    def _again(self, chunk: _Chunk) -> Tensor:
        with chunk.replay:
            return self.view(chunk.inputs)

    def _differentiate(self, pieces: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        """Mean nll and ∇h over (forward, targets) pieces."""
        parameters = list(self.view.parameters.values())
        total: list[Tensor] | None = None
        sums, counts = [], []
        for forward, y in pieces:
            with torch.enable_grad():
                z = forward()
            nll, score = nll_and_score(self.likelihood, z.detach(), y)
            found = torch.autograd.grad(z, parameters, score.to(z.dtype), allow_unused=True, materialize_grads=True)
            if total is None:
                total = list(found)
            else:
                torch._foreach_add_(total, found)
            sums.append(nll.to(_real(z)))
            counts.append(self._count(z, y))
        assert total is not None  # there is at least one batch
        count = self._total(counts)
        gradient = torch.cat([g.reshape(-1) for g in total]) / count
        if self.l2:
            gradient = gradient + self.l2 * torch.cat([p.detach().reshape(-1) for p in parameters])
        return torch.stack(sums).sum() / count, gradient.to(self.view.dtype)

    def _count(self, z: Tensor, y: Any) -> Tensor:
        return torch.as_tensor(self.likelihood.count(z.detach(), y), device=z.device).to(_real(z))

    def _total(self, counts: Sequence[Tensor]) -> Tensor:
        return counts[0] if is_plain_sum(self.likelihood) else torch.stack(list(counts)).sum()


class DampedCurvature(LinearOperator):
    """``G + damping I`` with G the curvature of the loss over several micro-batches.

    Args:
        view: the model.
        likelihood: p(y|z).
        batches: (inputs, targets) micro-batches.
        kind: "gauss_newton" or "metric".
        damping: the coefficient of the identity, λ + η; may be set anew.

    Raises:
        ValueError: unknown kind, or an operation of the model that cannot be differentiated.
        TypeError: the likelihood has no metric.
    """

    def __init__(
        self,
        view: ModelView,
        likelihood: Likelihood,
        batches: Sequence[tuple[Any, Any]],
        kind: Curvature = "gauss_newton",
        damping: Float[Tensor, ""] | float = 0.0,
    ) -> None:
        check_curvature(kind)
        p = view.num_parameters
        super().__init__((p, p), dtype=view.dtype, device=view.device, domain=view, codomain=view, symmetric=True)
        self.damping = damping
        self.operators: list[GaussNewton | Fisher] = [
            GaussNewton(view, likelihood, x, y) if kind == "gauss_newton" else Fisher(view, likelihood, x, y=y)
            for x, y in batches
        ]
        self.shares = [torch.ones((), device=view.device)]
        if len(self.operators) > 1:
            outputs = [operator._products.z for operator in self.operators]
            counts = [torch.as_tensor(likelihood.count(z, y)) for z, (_, y) in zip(outputs, batches, strict=True)]
            total = counts[0] if is_plain_sum(likelihood) else torch.stack(counts).sum()
            self.shares = [count / total for count in counts]

    def curvature(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """``G v``, without the damping."""
        if len(self.operators) == 1:
            return self.operators[0] @ v
        products = [
            (operator @ v).mul_(share.to(v.dtype)) for operator, share in zip(self.operators, self.shares, strict=True)
        ]
        return torch.stack(products).sum(0)

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.curvature(v) + v * self.damping


def check_curvature(kind: str) -> None:
    """Raises a ValueError where the word is unknown."""
    if kind not in get_args(Curvature):
        raise ValueError(f"curvature={kind!r}: expected one of {', '.join(map(repr, get_args(Curvature)))}")


def share_of(
    batches: Sequence[tuple[Any, Any]], share: float, generator: torch.Generator
) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """Some examples of every micro-batch, chosen at random, and the others.

    Args:
        batches: (inputs, targets) micro-batches.
        share: of the examples of each, at least one.
        generator: the source of the choice; not used where the share is 1.
    """
    if share == 1:
        return list(batches), []
    chosen, others = [], []
    for x, y in batches:
        size = batch_size(x)
        order = torch.randperm(size, generator=generator, device=generator.device)
        cut = min(size, max(1, round(share * size)))
        for part, into in ((order[:cut], chosen), (order[cut:], others)):
            if len(part):
                rows = part.sort().values
                into.append((select_rows(x, rows), select_rows(y, rows)))
    return chosen, others


def _real(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
