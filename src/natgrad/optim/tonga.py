"""TONGA: the gradient times the inverse covariance of the gradients of single examples.

N. Le Roux, P.-A. Manzagol, Y. Bengio, "Topmoumoute online natural gradient algorithm", NIPS 2007; as compared with the
natural gradient in [NATGRAD, sec. 4.1]. The covariance is that of the current batch, or a discounted mean over past
batches too, in low-rank form.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.curvature.discounted_covariance import DiscountedCovariance, PastGradients
from natgrad.curvature.gradient_covariance import Blocks, LowRankCovariance, check_blocks
from natgrad.curvature.gradient_rows import GradientRows
from natgrad.curvature.per_example import PerExampleGradients
from natgrad.likelihoods import Likelihood, is_plain_sum
from natgrad.model_view import Forward, batch_size
from natgrad.operators.gradient_moments import check_examples_apart
from natgrad.optim.arguments import check_real, check_whole
from natgrad.optim.precision import outside_autocast
from natgrad.optim.stats import Stats
from natgrad.optim.whole_model import WholeModelOptimizer


class TONGA(WholeModelOptimizer):
    r"""Steps ``−lr (C + λ I)^{-1} ∇h`` with C the covariance of per-example gradients [NATGRAD, sec. 4.1, eqs. 12, 13].

    Uncentred ``C = 1/n Σ g_i g_iᵀ``, centred ``C = 1/n Σ (g_i − ḡ)(g_i − ḡ)ᵀ``, over n examples of the batch, g_i being
    the gradient of the example's own summed nll. C is large where the examples disagree; the step avoids those
    directions. It is never written out: n gradients are held (as layer inputs and output derivatives where that is
    smaller), and a step costs ``O(n² P)``, through their Gram matrix and the Woodbury identity.

    Both forms step in the same direction where ∇h is the mean ḡ: with ``s = ḡᵀ (U + λ I)^{-1} ḡ ≤ 1``, the first-order
    decrease that the uncentred step foretells, the centred step is ``1 / (1 − s)`` times as long.

    Args:
        model: any module in which the examples of a batch do not depend on each other.
        likelihood: p(y|z); its ``nll`` is the loss h.
        lr: multiplies the step.
        damping: λ, constant; None takes ``share`` of the trace of C at every step, so that the step does not depend on
            the scale of the loss.
        share: see ``damping``.
        momentum: μ in ``v ← μ v + (C + λ I)^{-1} ∇h``, the step then being ``−lr v``.
        centered: True takes the covariance of the derivation instead of U, and steps of no bounded length.
        blocks: "full"; "layer" or "tensor" drop the covariance between layers or parameters.
        gradients: at most so many examples of a batch, chosen at random, enter C; None for all of them.
        past: what is kept of the covariances of past batches, as in the paper; C is then their discounted mean with
            that of the batch. It costs ``rank (rank + n)`` inner products of the size of the parameters a step, and the
            memory of ``rank`` copies of them. None: C is that of the batch alone.
        seed: of that choice.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.
        chunk_size: examples in one pass of ``torch.func``, for parameters outside of linear layers.

    Attributes:
        stats: of the last step: loss, lambda, trace (of C), rank (of C, at most), step_norm; skipped and updates in
            all.

    Raises:
        ValueError: a setting out of range.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 0.3,
        damping: float | None = None,
        share: float = 0.003,
        momentum: float = 0.9,
        centered: bool = False,
        blocks: Blocks = "full",
        gradients: int | None = None,
        past: PastGradients | None = None,
        seed: int = 0,
        forward: Forward | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_blocks(blocks)
        check_real(damping=1.0 if damping is None else damping, share=share, momentum=momentum)
        check_whole(gradients=gradients, chunk_size=chunk_size)
        if past is not None and not isinstance(past, PastGradients):
            raise TypeError(f"past={past!r}: expected natgrad.PastGradients(rank=16, discount=0.9) or None")
        if damping is not None and not 0 < damping < math.inf:
            raise ValueError(
                f"damping={damping}: expected a positive number or None; C has fewer gradients than parameters and no "
                "inverse without damping"
            )
        if not 0 < share < math.inf:
            raise ValueError(f"share={share}: expected a positive number, the part of C's trace that is the damping")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: expected a number from 0 up to, but not including, 1")
        if gradients is not None and gradients < 1:
            raise ValueError(f"gradients={gradients}: expected at least one example, or None for the whole batch")
        super().__init__(model, likelihood, lr=lr, seed=seed, forward=forward)
        self.damping, self.share, self.centered, self.blocks = damping, share, centered, blocks
        self.gradients, self.momentum = gradients, momentum
        size = self.view.num_parameters if momentum else 0
        self._velocity = torch.zeros(size, dtype=self.view.dtype, device=self.view.device)
        self._collect = PerExampleGradients(self.view, chunk_size)
        self.past = past
        rank = 0 if past is None else past.rank
        self._kept = torch.zeros(rank, self.view.num_parameters, dtype=self.view.dtype, device=self.view.device)
        self._mass = self._scalar()  # of the past batches: Σ γ^(t−s)

    def _vectors(self) -> dict[str, Tensor]:
        velocity = {"velocity": self._velocity} if self.momentum else {}
        return velocity | {f"past_{i}": row for i, row in enumerate(self._kept)}

    def _numbers(self) -> dict[str, Tensor]:
        return {} if self.past is None else {"mass": self._mass}

    @torch.no_grad()
    @outside_autocast
    def step(  # pyrefly: ignore[bad-override] - evaluates the model itself
        self, inputs: Any = None, targets: Any = None, micro_batch_size: int | None = None, closure: Any = None
    ) -> Float[Tensor, ""] | None:
        """Evaluate a mini-batch and update the parameters.

        Args:
            inputs: one batch; or, with ``targets=None``, an iterable of (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: evaluate at most so many examples at a time.
            closure: not supported.

        Returns:
            the loss before the update, a 0-d tensor. Where it or the step is not finite, parameters and buffers stay as
            they were, and ``stats["skipped"]`` counts the batch.

        Raises:
            TypeError: a closure is given.
            ValueError: inputs or targets that do not fit; batch normalisation in train mode.
        """
        batches = self._batches(inputs, targets, micro_batch_size, closure)
        if batches is None:
            return None
        self._check_trainable()
        check_examples_apart(self.view, "TONGA's covariance of gradients")
        buffers = self._buffers()
        rows, nll, gradient, count = self._evaluate(batches)
        now = LowRankCovariance(rows, centered=self.centered, blocks=self.blocks)
        if len(rows) == 1 and self.centered and self.damping is None:
            what = "inputs" if self.gradients != 1 else "gradients=1"
            raise ValueError(
                f"{what}: the gradient of one example has no covariance; use more examples, or centered=False or a "
                "constant damping"
            )
        covariance = now if self.past is None else DiscountedCovariance(self._kept, self._weight_of_past(), now)
        trace = covariance.trace()
        # gradients that are all alike have no covariance: the step is then 0 instead of infinite
        tiny = torch.finfo(trace.dtype).tiny
        damping = torch.full_like(trace, self.damping) if self.damping is not None else self.share * trace
        inverse = covariance.inverse(damping.clamp(min=tiny))
        if gradient is None:
            u = torch.ones(len(rows), dtype=trace.dtype, device=trace.device) / count
            direction = inverse.of_combination(u)
        else:
            direction = inverse @ (gradient / count)
        loss = nll / count
        usable = torch.isfinite(loss) & torch.isfinite(trace) & (inverse.ok | (damping <= tiny))
        usable = usable & torch.isfinite(direction.sum())
        step = torch.where(usable & (damping > tiny), -direction, torch.zeros_like(direction))
        if self.momentum:
            self._velocity.copy_(torch.where(usable, self.momentum * self._velocity + step, self._velocity))
            step = torch.where(usable, self._velocity, torch.zeros_like(step))
        if isinstance(covariance, DiscountedCovariance):
            self._keep(covariance, usable)
        self._add(step)
        self._count_step(usable, buffers)
        self.stats = Stats(
            {
                "loss": loss,
                "lambda": damping,
                "trace": trace,
                "rank": min(len(rows) - self.centered + len(self._kept), self.view.num_parameters),
                "step_norm": torch.linalg.vector_norm(step),
                **{name: count.clone() for name, count in self._counts.items()},
                "updates": self._update_number,
            }
        )
        return loss.to(direction.dtype)

    def _weight_of_past(self) -> Float[Tensor, ""]:
        """The share of the batches before in C."""
        mass = (0.0 if self.past is None else self.past.discount) * self._mass
        return mass / (mass + 1)

    def _keep(self, covariance: DiscountedCovariance, usable: Bool[Tensor, ""]) -> None:
        """The leading directions of C, for the batches to come; a batch that is not finite leaves what there was."""
        assert self.past is not None
        self._kept.copy_(torch.where(usable, covariance.leading(), self._kept))
        self._mass.copy_(torch.where(usable, self.past.discount * self._mass + 1, self._mass))

    def _evaluate(
        self, batches: list[tuple[Any, Any]]
    ) -> tuple[GradientRows, Tensor, Float[Tensor, " P"] | None, Tensor]:
        """Rows, summed nll, gradient of that sum (None where it is the sum of the rows) and the count."""
        sizes = [batch_size(x) for x, _ in batches]
        nll, counts = self._scalar(), []
        rows: GradientRows | None = None
        gradient: Tensor | None = None
        for (x, y), index in zip(batches, self._chosen(sizes), strict=True):
            passed = self._collect(self.likelihood, x, y, index)
            self._validate(passed.z, y)
            nll = nll + passed.nll
            counts.append(torch.as_tensor(self.likelihood.count(passed.z, y), device=nll.device).to(nll.dtype))
            if passed.gradient is not None or gradient is not None:
                here = passed.rows.sum() if passed.gradient is None else passed.gradient
                so_far = rows.sum() if gradient is None and rows is not None else gradient
                gradient = here if so_far is None else so_far + here
            rows = passed.rows if rows is None else rows.append(passed.rows)
        assert rows is not None  # there is at least one batch
        count = counts[0] if is_plain_sum(self.likelihood) else torch.stack(counts).sum()
        return rows, nll, gradient, count

    def _chosen(self, sizes: Sequence[int]) -> list[Tensor] | list[None]:
        """Which examples of every micro-batch enter C, or None for all; the same however a batch is cut."""
        examples = sum(sizes)
        if self.gradients is None or self.gradients >= examples:
            return [None for _ in sizes]
        order = torch.randperm(examples, generator=self._generator, device=self._generator.device)
        if len(sizes) == 1:  # nothing waits for the device
            return [order[: self.gradients].sort().values]
        enters = torch.zeros(examples, dtype=torch.bool, device=order.device)
        enters[order[: self.gradients]] = True
        return [part.nonzero()[:, 0] for part in enters.split(list(sizes))]
