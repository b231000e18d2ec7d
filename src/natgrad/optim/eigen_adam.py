"""Adam in the Kronecker eigenbasis of the Fisher matrix."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.curvature.base import factors_from
from natgrad.curvature.inverse import Eigenbasis
from natgrad.curvature.running import RunningFactors
from natgrad.damping import ExactTikhonov
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Coverage, cover
from natgrad.likelihoods import Likelihood
from natgrad.linalg.low_rank import LowRank
from natgrad.model_view import Forward
from natgrad.operators.chain import Chain
from natgrad.optim.adam_step import AdamStep
from natgrad.optim.arguments import check_objects
from natgrad.optim.evaluation import Evaluator
from natgrad.optim.inverses import LayerInverses
from natgrad.optim.layer_state import leaders, load_factors, save_layer
from natgrad.optim.layout import JointLayout
from natgrad.optim.leading_bases import LeadingBases
from natgrad.optim.precision import outside_autocast
from natgrad.optim.rotations import divergence, rotate, with_rows
from natgrad.optim.scaling import KLClip
from natgrad.optim.settings import Periods, Subsets
from natgrad.optim.static import StaticInputs
from natgrad.optim.stats import Stats
from natgrad.optim.whole_model import WholeModelOptimizer


class EigenAdam(WholeModelOptimizer):
    r"""Adam's moments of the gradient in the eigenbasis of each layer's factors A and G.

    Beyond the papers: K-FAC (exact Tikhonov) divides the rotated gradient ``R = Q_Gᵀ ∇h Q_A`` by eigenvalues of the
    Fisher matrix, EKFAC by its second moments per example; here Adam divides its decayed mean by the root of its
    decayed square, as SOAP does with the gradient's own second moments in the place of the sampled Fisher's factors:

        ``m ← β₁ m + (1−β₁) R,   v ← β₂ v + (1−β₂) R²,   W ← W − lr Q_G [m̂ / (√v̂ + ε)] Q_Aᵀ``

    with m̂ and v̂ corrected for their start at zero (with ``nesterov`` m̂ is ``β₁ m + (1−β₁) R``, one step ahead, so
    corrected) and, for a layer of n inputs, ``lr √(width / n)`` in the place of lr:
    a unit's weights then move as far in a wide layer as in a narrow one. A new basis re-rotates m and leaves v as it
    was. Of a wide factor the leading eigenvectors alone are found (``rank``), and the basis is completed by as little
    as it takes, so that beyond them m and v are about Adam's own. An update that would move the model's distribution
    too far is shortened (``clip``). Parameters that no layer's factors cover take Adam's own step. The learning rate is
    an ordinary one; it rises linearly over the first ``warmup`` updates and, with ``anneal``, falls as ``1 / √(1 + k /
    anneal)``. Any ``lr_scheduler`` works besides. Layers of hundreds of units are fast with a rank::

        optimizer = ng.EigenAdam(model, likelihood, lr=1.2e-2, rank=64, anneal=20)
        loss = optimizer.step(x, y)

    Args:
        model: any module.
        likelihood: p(y | z); the loss is ``likelihood.nll``.
        lr: the learning rate.
        betas: β₁ and β₂.
        nesterov: the mean counts the present gradient once more, as in NAdam (Dozat 2016).
        eps: ε.
        weight_decay: decoupled, as in ``torch.optim.AdamW``.
        warmup: updates until the learning rate is reached.
        anneal: updates after which it is 1/√2 of that: a short run ends where the noise of an update, which is in
            proportion to it, lets it. None: it stays.
        width: the number of inputs of a layer in which lr is the learning rate; None: in all of them.
        clip: bounds ``½ δᵀ F̆ δ`` of an update δ, about the Kullback-Leibler divergence between the distributions before
            and after it: a longer δ is shortened. None: no bound.
        seed: of the optimiser's own random stream (subsets, sampled targets).
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.
        subsets: τ₁, the share of a batch whose sampled targets enter the factors.
        periods: how often the factors take in an estimate, and how often they are decomposed.
        decay: the cap on ε in the decayed averages of the factors.
        static_inputs: as for :class:`natgrad.KFAC`.
        rank: how many eigenvectors are found of a factor of at least twice as many rows, by one step of subspace
            iteration from the last ones; None: all of every factor, by a whole decomposition.
        rotation_dtype: of the products with eigenvectors, such as ``torch.bfloat16`` where the hardware multiplies it
            faster; None: that of the parameters. Moments, factors and decompositions stay in theirs.
        sharing: as for :func:`natgrad.kronecker_fisher`.

    Attributes:
        stats: of the last step: ``loss``, ``grad_norm``, ``updates``, ``skipped`` (batches that were not finite and
            changed nothing), ``failed_bases`` (decompositions that failed; the layer keeps its last good basis).

    Raises:
        TypeError: a setting of the wrong kind.
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 1.2e-2,
        betas: tuple[float, float] = (0.9, 0.98),
        nesterov: bool = True,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup: int = 5,
        anneal: float | None = None,
        width: float | None = 400,
        clip: KLClip | None = KLClip(0.25),
        seed: int = 0,
        forward: Forward | None = None,
        subsets: Subsets = Subsets(1 / 8, 1 / 8),
        periods: Periods = Periods(inverses=10, early=(1, 2, 3, 4, 5, 6, 8, 15, 25)),
        decay: float = 0.95,
        static_inputs: Any = None,
        rank: int | None = None,
        rotation_dtype: torch.dtype | None = None,
        sharing: str | Mapping[str, str] = "expand",
    ) -> None:
        check_objects(subsets=subsets, periods=periods, clip=clip)
        if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: expected two numbers in [0, 1), such as (0.9, 0.98)")
        if not 0 < eps < math.inf or not 0 <= weight_decay < math.inf:
            raise ValueError(f"eps={eps}, weight_decay={weight_decay}: expected a positive and a non-negative number")
        if warmup < 0:
            raise ValueError(f"warmup={warmup}: expected a number of updates, 0 for none")
        if anneal is not None and not 0 < anneal < math.inf:
            raise ValueError(f"anneal={anneal}: expected a number of updates, such as 20, or None for a constant lr")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank={rank}: expected a number of eigenvectors, such as 64, or None for all")
        if width is not None and not 0 < width < math.inf:
            raise ValueError(f"width={width}: expected a number of inputs, such as 400, or None")
        super().__init__(model, likelihood, lr=lr, seed=seed, forward=forward)
        self.weight_decay, self.warmup, self.anneal = weight_decay, warmup, anneal
        self._adam = AdamStep(betas, eps, nesterov)
        self.subsets, self.periods, self.width, self.clip = subsets, periods, width, clip
        self._coverage = cover(self.view, "identity", "block_diagonal", sharing)
        self.layout = JointLayout(self.view, self._coverage)
        self._running = RunningFactors(decay)
        if rotation_dtype is not None and not rotation_dtype.is_floating_point:
            raise ValueError(f"rotation_dtype={rotation_dtype}: expected a real dtype, such as torch.bfloat16")
        self.rotation_dtype = rotation_dtype
        self._in_use: dict[str, tuple[Eigenbasis, Eigenbasis]] = {}  # a basis, and the same in rotation_dtype
        self._bases = LayerInverses(ExactTikhonov()) if rank is None else LeadingBases(LowRank(rank))
        self._evaluator = Evaluator(
            self.view,
            likelihood,
            Capture(model, self._coverage.blocks),
            self.layout,
            chain=Chain.of(self.view),
            static=None if static_inputs is None else StaticInputs(static_inputs),
        )
        self._gradient, self._rotated, self._mean, self._square = self.layout.buffers(4)
        self._taken = self._scalar().float()  # as Adam's kernels want it

    def coverage(self) -> Coverage:
        """What is treated how; ``print`` it for a table with parameter counts. Adam's own step counts as identity."""
        return self._coverage

    @torch.no_grad()
    @outside_autocast
    def step(  # pyrefly: ignore[bad-override] - the model is evaluated here
        self, inputs: Any = None, targets: Any = None, micro_batch_size: int | None = None, closure: Any = None
    ) -> Float[Tensor, ""] | None:
        """Evaluate a mini-batch and update the parameters.

        Args:
            inputs: one batch, as ``forward`` (or the model) takes it; or, with ``targets=None``, a re-iterable of
                (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: split the batch into chunks of at most this many examples.
            closure: not supported.

        Returns:
            the loss before the update: a 0-d tensor.

        Raises:
            TypeError: a closure is given, or inputs are missing while a learning rate is not 0.
            ValueError: inputs or targets that do not fit the model and the likelihood, or an empty batch.
        """
        batches = self._batches(inputs, targets, micro_batch_size, closure)
        if batches is None:
            return None
        update = self._update_number + 1
        buffers = self._buffers()
        subsets = self.subsets.at(update) if self.periods.observes(update) else None
        self._share_rotations(0 if self.periods.due(update) else self._rows(batches))
        evaluation = self._evaluator(batches, subsets, self._generator, self._gradient)
        norm = torch.linalg.vector_norm(evaluation.gradient)
        finite = torch.isfinite(evaluation.loss) & torch.isfinite(norm)
        self._count_step(finite, buffers)
        if evaluation.statistics.examples:
            self._running.update(factors_from(evaluation.statistics, in_place=True), finite)
        due = (self.periods.due(update) or not self._bases) and bool(self._running.factors)
        if due and finite:  # the device is waited for once in a while: decompositions do that too
            self._renew()
            self._share_rotations(0)
        self._descend(finite)
        self.stats = Stats(
            {
                "loss": evaluation.loss,
                "grad_norm": norm,
                "updates": self._update_number,
                "failed_bases": self._bases.failures,
                **self._counts,
            }
        )
        return evaluation.loss.to(self._gradient.dtype)

    def _renew(self) -> None:
        """New bases from the averaged factors; m is rotated from the old ones into them."""
        mean, bases = self.layout.blocks(self._mean), self._bases
        old = {name: bases.basis(name) for name in mean}
        bases.refresh({name: self._running.factors[name] for name in mean}, 0.0)
        bases.constant = () if self._evaluator.static is None else self._evaluator.static.layers
        for name, m in mean.items():
            new, before = bases.basis(name), old[name]
            if new is not None and new is not before:
                m.copy_(new.rotate(m if before is None else before.rotate_back(m)))

    def _rows(self, batches: Sequence[tuple[Any, Any]]) -> int:
        """How many rows every layer of a chain sees of a batch; 0 for any other model."""
        if self._evaluator.chain is None:
            return 0
        return sum(inputs.numel() // inputs.shape[-1] for inputs, _ in batches)

    def _share_rotations(self, rows: int) -> None:
        """Which sides of the next gradient are rotated with its rows, and which are left (see :func:`with_rows`)."""
        self._evaluator.rotations, self._remaining = {}, self._known()
        for name, basis in self._known().items() if rows else ():
            if "weight" in self._coverage.blocks[name].members:
                self._evaluator.rotations[name], self._remaining[name] = with_rows(basis, rows)

    def _known(self) -> dict[str, Eigenbasis]:
        """The bases so far, to rotate with."""
        found = {name: self._bases.basis(name) for name in self._coverage.blocks}
        known = {name: basis for name, basis in found.items() if basis is not None}
        if self.rotation_dtype is None:
            return known
        for name, basis in known.items():
            if name not in self._in_use or self._in_use[name][0] is not basis:
                self._in_use[name] = basis, basis.to(self.rotation_dtype)
        return {name: self._in_use[name][1] for name in known}

    def _descend(self, finite: Bool[Tensor, ""]) -> None:
        """Adam's step on the rotated gradient; none where ``finite`` is False."""
        if finite.device.type != "cuda" and not finite:
            return
        rotate(self.layout, self._remaining, self._gradient, self._rotated)
        moments = (self._mean, self._square, self._taken)
        step = self._adam(self._rotated, moments, self._schedule(), finite, out=self._gradient)
        bases = self._known()
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for name, V in self.layout.blocks(step).items():
            V.mul_(self._share(name))
        if self.clip is not None and bases:
            step.mul_(self.clip(divergence(self.layout, bases, step) * max(rates.values()) ** 2))
        rotate(self.layout, bases, step, self._rotated, back=True)
        for name, step in self.layout.parameters(self._rotated).items():
            parameter = self.view.parameters[name]
            lr = rates[id(parameter)]
            if self.weight_decay:
                parameter.mul_(1 - lr * self.weight_decay * finite.to(parameter.dtype))
            parameter.add_(step, alpha=lr)

    def _schedule(self) -> float:
        """``min(k / warmup, 1) / √(1 + k / anneal)`` at update k."""
        k = self._update_number
        return min(k / max(self.warmup, 1), 1.0) / math.sqrt(1 + k / self.anneal if self.anneal else 1.0)

    def _share(self, name: str) -> float:
        """``√(width / n)`` of a layer with n inputs; 1 where A is diagonal: one input at a time, as in an embedding."""
        block = self._coverage.blocks[name]
        if self.width is None or len(block.factor_shapes[0]) < 2:
            return 1.0
        return math.sqrt(self.width / block.shape[-1])

    def _numbers(self) -> dict[str, Tensor]:
        return {"taken": self._taken}

    def _tensors(self) -> list[dict[str, Tensor]]:
        """Per parameter: the moments, and what belongs to the layer that it leads."""
        mean, square = (self.layout.parameters(flat) for flat in (self._mean, self._square))
        leading = leaders(self._coverage.blocks)
        saved = []
        for name in self.view.names:
            state = {"exp_avg": mean[name].clone(), "exp_avg_sq": square[name].clone()}
            if name in leading:
                layer = leading[name]
                state |= save_layer(self._coverage.blocks[layer], self._running.factors.get(layer), self._bases)
            saved.append(state)
        return saved

    def state_dict(self) -> dict[str, Any]:
        """Moments, factors, bases, counters and the random stream, in the form of every torch optimiser's state."""
        state = super().state_dict()
        state["state"] = dict(enumerate(self._tensors()))
        return state

    def _saved_numbers(self) -> dict[str, Any]:
        updates = self._running.updates
        return super()._saved_numbers() | {
            "factor_updates": 0.0 if updates is None else float(updates),
            "failed_bases": self._bases.failures,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, bit for bit on the same machine with the same number of threads.

        Raises:
            ValueError: the state is of another model or optimiser; what does not fit is named, nothing was changed.
        """
        super().load_state_dict(state_dict)
        numbers, tensors = self._check_state(state_dict)
        self._bases.failures = int(numbers["failed_bases"])
        known = numbers["factor_updates"] > 0
        self._running.updates = self._scalar(numbers["factor_updates"]) if known else None
        self._running.factors = {}
        mean, square = (self.layout.parameters(flat) for flat in (self._mean, self._square))
        leading = leaders(self._coverage.blocks)
        for name, saved in zip(self.view.names, tensors, strict=True):
            mean[name].copy_(saved["exp_avg"])
            square[name].copy_(saved["exp_avg_sq"])
            if name in leading:
                state = {key: value.detach().to(self._mean.device) for key, value in saved.items()}
                self._bases.load(leading[name], state)
                if known:
                    self._running.factors[leading[name]] = load_factors(state)

    def _check_state(self, state: Any) -> tuple[Mapping[str, Any], list[Mapping[str, Tensor]]]:
        numbers, tensors = super()._check_state(state)
        missing = [key for key in ("factor_updates", "failed_bases") if key not in numbers]
        if missing:
            raise ValueError(f"state_dict['param_groups'][0] lacks {missing}; expected the state of an EigenAdam")
        return numbers, tensors
