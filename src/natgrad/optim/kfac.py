"""K-FAC: [KFAC, Algorithm 2] for the block-diagonal and the block-tridiagonal inverse.

One update, in the order of the paper: gradient and sampled statistics of the mini-batch, inverse (every T₃), proposal
``Δ = −F̆^{-1} ∇h``, coefficients (α, μ) of ``δ = α Δ + μ δ₀`` from the exact F, reduction ratio ρ, λ rule (every T₁)
and γ rule (every T₂). Every decision is a tensor on the device; a number reaches Python only when somebody reads
``stats``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.base import Statistics, factors_from
from natgrad.curvature.running import RunningFactors, mean_eigenvalue
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Coverage, Uncovered, cover
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView, batch_size
from natgrad.operators.chain import Chain
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim import kfac_state
from natgrad.optim.arguments import check_number, check_objects, seeded
from natgrad.optim.attempt import Verdict, try_update
from natgrad.optim.batches import micro_batches
from natgrad.optim.evaluation import Evaluation, Evaluator
from natgrad.optim.layout import JointLayout
from natgrad.optim.local_model import LocalModel
from natgrad.optim.of_model import OptimizerOfModel
from natgrad.optim.precision import outside_autocast
from natgrad.optim.proposal import Proposals
from natgrad.optim.rescaling import LayerCoefficients
from natgrad.optim.select import keep_where
from natgrad.optim.settings import Damping, Periods, Rescaling, StepGuard, Subsets, published
from natgrad.optim.stats import Stats
from natgrad.optim.structures import check_structure, damping_for, inverses_for, rescaling_for, static_for
from natgrad.optim.trials import best_gamma
from natgrad.quadratic import Subspace, best_coefficients


class KFAC(OptimizerOfModel):
    r"""Kronecker-factored approximate curvature with automatic step sizes [KFAC, Algorithm 2].

    Each :meth:`step` evaluates a mini-batch and updates the parameters by ``δ = α Δ + μ δ₀`` with ``Δ = −c F̆_γ^{-1}
    ∇h``: ``h`` is the mean loss plus ``η/2 ‖θ‖²``, ``F̆_γ`` the block-diagonal Kronecker-factored Fisher damped by γ,
    c a coefficient for each layer, and (α, μ) minimise ``M(δ) = ½ δᵀ(F + (λ+η) I) δ + ∇h·δ + h`` with the exact Fisher
    F of a subset of the batch; c comes from M too. λ follows the Levenberg-Marquardt rule.

    Args:
        model: any module; its ``nn.Linear`` layers get Kronecker factors.
        likelihood: ``p(y | z)``; its ``nll`` is the loss.
        structure: ``"block_diagonal"``; ``"block_tridiagonal"``: F̂, which couples the neighbours in a chain of layers
            [KFAC, sec. 4.3]; or ``"ekfac"``: second moments of the gradient in the eigenbasis of F̆.
        damping: None (λ starts from the factors of the first batch), a number (λ without η at the first update) or a
            :class:`Damping`.
        l2: η, the coefficient of ``½ ‖θ‖²`` in the objective.
        momentum: whether δ₀ takes part (False gives μ = 0).
        seed: of the optimiser's own random stream (subsets, sampled targets).
        forward: ``forward(model, inputs) -> z`` for models that are not called as ``model(inputs)``.
        subsets: τ₁ and τ₂.
        periods: T₃, the early refreshes, and how often the factors take in an estimate.
        guard: when an update is shortened or rejected, or None to accept every one.
        decay: the cap on ε in the decayed averages of the factors, ``ε = min(1 − 1/k, decay)``.
        rescaling: whether each layer's part of Δ gets a coefficient of its own beside α.
        static_inputs: all inputs of the training set, where first layers see them unchanged: their A is computed once.
        uncovered: trainable parameters that no factor covers: ``"error"``, ``"identity"`` or ``"diagonal"``.
        sharing: how the positions of an example count, as for :func:`natgrad.kronecker_fisher`.

    Attributes:
        stats: of the last update: loss, rho, lambda, gamma, alpha, mu, step_norm, accepted; skipped, rejected,
            shortened, updates.

    Raises:
        ValueError: a setting out of range, or an uncovered parameter (it is named).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        structure: str = "block_diagonal",
        damping: float | Damping | None = None,
        l2: float = 0.0,
        momentum: bool = True,
        seed: int = 0,
        forward: Forward | None = None,
        subsets: Subsets = Subsets(1 / 16, 1 / 16, minimum=64, early=128),
        periods: Periods = Periods(),
        guard: StepGuard | None = StepGuard(),
        decay: float = 0.95,
        rescaling: Rescaling = Rescaling(),
        static_inputs: Any = None,
        uncovered: Uncovered = "error",
        sharing: str | Mapping[str, str] = "expand",
        lr: float = 1.0,
    ) -> None:
        check_structure(structure, ("block_diagonal", "block_tridiagonal", "ekfac"), "KFAC")
        check_likelihood(likelihood)
        check_objects(subsets=subsets, periods=periods, guard=guard, rescaling=rescaling)
        check_number("l2", l2)
        check_number("lr", lr, "; 1 takes the computed step")
        self.damping = damping_for(structure, damping)
        if self.damping.gamma is not None and self.damping.gamma.every % periods.inverses:
            raise ValueError(
                f"GreedyGamma(every={self.damping.gamma.every}): T₂ must be a multiple of T₃ = {periods.inverses}, the "
                "period of the inverses"
            )
        view = ModelView(model, forward)
        self._coverage = cover(view, uncovered, structure, sharing)
        super().__init__(list(view.parameters.items()), {"lr": lr})
        self.view, self.likelihood, self.structure = view, likelihood, structure
        self.l2, self.momentum, self.decay, self.rescaling = l2, momentum, decay, rescaling_for(structure, rescaling)
        self.subsets, self.periods, self.guard = subsets, periods, guard
        self.layout = JointLayout(view, self._coverage)
        self.capture = Capture(model, self._coverage.blocks)
        chain = Chain.of(view)
        assert self.damping.form is not None  # damping_for chose one
        inverses = inverses_for(structure, self.damping.form, self._coverage)
        self._evaluator = Evaluator(
            view,
            likelihood,
            self.capture,
            self.layout,
            chain=chain,
            static=static_for(structure, static_inputs),
            diagonal=self._coverage.uncovered if uncovered == "diagonal" else (),
            inverses=inverses,
        )
        self._generator = seeded(seed, view.device)
        real = torch.float64 if view.device.type != "mps" else torch.float32
        scalar = torch.zeros((), dtype=real, device=view.device)
        self._update_number = 0
        self._started = self.damping.value is not None
        self._lam = scalar + (self.damping.value if self.damping.value is not None else torch.nan)
        self._gamma = (self._lam + l2).sqrt()
        self._running = RunningFactors(decay)
        self.proposals = Proposals(self.layout, self._running, inverses, l2)
        self.coefficients = LayerCoefficients(self.layout, self.rescaling, scalar)
        self.local = LocalModel(view, likelihood, self.layout, chain, l2)
        (self._previous,) = self.layout.buffers(1)  # δ₀; the gradient and Δ live as long as a step
        self._counts = {key: scalar.clone() for key in ("skipped", "rejected", "shortened")}
        self.stats = Stats()

    @classmethod
    def paper(cls, model: nn.Module, likelihood: Likelihood, *, l2: float = 1e-5, **settings: Any) -> "KFAC":
        """Exactly the published algorithm and constants [KFAC, sec. 6, 8, 13].

        λ₀ = 150, T₁ = 5, T₂ = 20, T₃ = 20, ω₁ = (19/20)^T₁, ω₂ = (√(19/20))^T₂, factored Tikhonov damping with the
        trace-norm π, the greedy γ rule on M(δ), τ₁ = 1/8, τ₂ = 1/4, ε = min(1 − 1/k, 0.95), η = 10⁻⁵, inverses at k ≤
        3; no step guard and no other bound.
        """
        return cls(model, likelihood, l2=l2, **{**published(), **settings})

    @torch.no_grad()
    @outside_autocast
    def step(  # pyrefly: ignore[bad-override] - K-FAC evaluates the model itself
        self, inputs: Any = None, targets: Any = None, micro_batch_size: int | None = None, closure: Any = None
    ) -> Float[Tensor, ""] | None:
        """Evaluate a mini-batch and update the parameters.

        Args:
            inputs: one batch, as ``forward`` (or the model) takes it; or, with ``targets=None``, a re-iterable of
                (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: split the batch into chunks of at most this many examples, for batches larger than memory.
            closure: not supported; see Raises.

        Returns:
            the loss before the update, without the l2 term: a 0-d tensor. Where it or its gradient is not finite, the
            batch is skipped and counted in ``stats["skipped"]``: parameters, buffers, factors, λ and γ stay as they
            were.

        Raises:
            TypeError: a closure is given. K-FAC evaluates the model itself; ``natgrad.Preconditioner`` works in loops
                that own the backward pass.
            ValueError: inputs or targets that do not fit the model and the likelihood, or an empty batch.
        """
        if closure is not None or callable(inputs):
            raise TypeError(
                "KFAC.step(inputs, targets) evaluates the model itself and takes no closure; in a loop that calls "
                "loss.backward() use natgrad.Preconditioner in front of any torch.optim optimiser"
            )
        if inputs is None:
            return self._step_without_data()
        batches = micro_batches(inputs, targets, micro_batch_size)
        buffers = [(buffer, buffer.clone()) for buffer in self.view.module.buffers()]
        evaluation = self._evaluator(
            batches,
            self.subsets.at(self._update_number + 1),
            self._generator,
            keep_rows=self.proposals.wants_rows(sum(batch_size(x) for x, _ in batches)),
            held_out=self.guard is not None,
            observe=self.periods.observes(self._update_number + 1),
        )
        self._update_number += 1
        finite = torch.isfinite(evaluation.loss) & torch.isfinite(evaluation.gradient.sum())
        for buffer, before in buffers:
            keep_where(buffer, finite, before)
        self._add_l2(evaluation.gradient)
        if evaluation.statistics.examples:
            self.proposals.observe(factors_from(evaluation.statistics, in_place=True), finite)
            evaluation.statistics = Statistics()  # they take as much memory as the averages
        self._tie_gamma()
        if not self._started:
            self._start(finite)
        elif self.periods.due(self._update_number):
            self._refresh()
        self._adapt_gamma(evaluation)
        self._update(evaluation, finite)
        return evaluation.loss.to(self._previous.dtype)

    def coverage(self) -> Coverage:
        """What is treated how; ``print`` it for a table with parameter counts."""
        return self._coverage

    def state_dict(self) -> dict[str, Any]:
        """δ₀, factors, inverses, λ, γ, counters and the random stream: tensors and plain numbers.

        The form is that of every torch optimiser: ``"state"`` by parameter, ``"param_groups"`` for the rest. Nothing in
        it carries the name of a rank or of a wrapper.
        """
        state = super().state_dict()
        state["state"] = dict(enumerate(kfac_state.save_tensors(self)))
        state["param_groups"][0] |= kfac_state.save_numbers(self)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, bit for bit on the same machine with the same number of threads.

        Raises:
            ValueError: the state is of another model or other settings; what does not fit is named, and nothing was
                changed.
        """
        numbers, tensors, saved = *kfac_state.check(self, state_dict), kfac_state.save_numbers(self)
        super().load_state_dict({"state": {}, "param_groups": [{k: v for k, v in numbers.items() if k not in saved}]})
        kfac_state.load(self, numbers, tensors)

    def _step_without_data(self) -> None:
        """``step()`` with every lr at 0, as distributed checkpointing calls it: all state exists from the start."""
        if any(group["lr"] != 0 for group in self.param_groups):
            raise TypeError(
                "step: inputs are missing; expected step(inputs, targets), for K-FAC evaluates the model itself"
            )

    def _start(self, finite: Tensor) -> None:
        """λ from the factors of the first batch that is finite; waits for the device, this once."""
        if not finite:
            return
        self._started = True
        self._lam = self.damping.start * mean_eigenvalue(self._running.factors).to(self._lam.dtype)
        self._tie_gamma(start=True)
        self._refresh()

    def _refresh(self) -> None:
        """New inverses; new coefficients with the next proposal."""
        self.proposals.refresh(self._gamma**2)
        self.coefficients.due = True

    def _directions(self, proposal: Float[Tensor, " size"]) -> list[Float[Tensor, " size"]]:
        """Δ, and with momentum δ₀."""
        return [proposal, self._previous] if self.momentum else [proposal]

    def _tie_gamma(self, *, start: bool = False) -> None:
        """γ = ratio √(λ + η); where a rule moves γ on its own, √(λ + η) at the start alone."""
        if start or self.damping.gamma is None:
            ratio = self.damping.ratio if self.damping.gamma is None else 1.0
            self._gamma = ratio * (self._lam + self.l2).sqrt()

    def _adapt_gamma(self, evaluation: Evaluation) -> None:
        """The γ rule: the best of three candidates, each with its own inverse [KFAC, sec. 6.6]."""
        rule = self.damping.gamma
        if rule is not None and self._update_number % rule.every == 0:
            damping = self._lam + self.l2
            candidates = rule.candidates(self._gamma, damping.sqrt())
            directions = self._directions(self.layout.empty())
            self._gamma = best_gamma(
                self.local, self.proposals, self.coefficients, evaluation, candidates, rule.quality, damping, directions
            )
            self._refresh()

    def _add_l2(self, gradient: Float[Tensor, " size"]) -> None:
        if self.l2:
            for name, part in self.layout.parameters(gradient).items():
                part.add_(self.view.parameters[name], alpha=self.l2)

    def _update(self, evaluation: Evaluation, finite: Tensor) -> None:
        """From the gradient to new parameters, λ and statistics of the step."""
        damping = self._lam + self.l2
        proposal = self.layout.empty()
        self.proposals.write(evaluation, self._gamma**2, proposal)
        self.coefficients.renew(self.local, evaluation, proposal, damping, finite)
        self.coefficients.apply(proposal)
        directions = self._directions(proposal)
        products = self.layout.inner_products([evaluation.gradient, *directions], directions)
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        scaled = any(rate != 1.0 for rate in rates.values())
        if not scaled:  # the gradient is not needed any more: let go of its memory
            evaluation.gradient = proposal
        model, rows_model = self.local.subspaces(evaluation.tapes, products, directions, damping)
        coefficients = best_coefficients(model)
        # δ takes the buffer of δ₀; then Δ's buffer keeps the old parameters until the step is accepted
        alpha, mu = coefficients[0], coefficients[1] if self.momentum else torch.zeros_like(coefficients[0])
        self._previous.mul_(mu).addcmul_(proposal, alpha.to(proposal.dtype))
        keep_where(self._previous, finite, 0.0)
        if scaled:  # M at the update that is made, not at the one that would be best
            for name, part in self.layout.parameters(self._previous).items():
                part.mul_(rates[id(self.view.parameters[name])])
            directions, coefficients = [self._previous], torch.ones_like(coefficients[:1])
            products = self.layout.inner_products([evaluation.gradient, *directions], directions)
            _, rows_model = self.local.subspaces(evaluation.tapes, products, directions, damping)
        verdict = try_update(
            self.local, evaluation, self._previous, proposal, rows_model, coefficients, self.guard, finite, self._lam
        )
        lam = self._damping_after(verdict, rows_model, coefficients)
        self._lam = torch.where(finite, lam, self._lam)
        self._counts["skipped"] += ~finite
        self._counts["rejected"] += finite & ~verdict.accepted
        self._counts["shortened"] += verdict.accepted & ~verdict.whole
        self.stats = Stats(
            {
                "loss": evaluation.loss,
                "rho": verdict.rho,
                "lambda": self._lam,
                "gamma": self._gamma,
                "alpha": alpha,
                "mu": mu,
                "step_norm": torch.where(verdict.accepted, verdict.norm, 0.0),
                "accepted": verdict.accepted,
                **self._counts,
                "updates": self._update_number,
                "failed_inverses": self.proposals.inverses.failures,
            }
        )

    def _damping_after(self, verdict: Verdict, model: Subspace, coefficients: Tensor) -> Float[Tensor, ""]:
        """λ by the λ rule where it is due; raised where the update could not stay as it was."""
        rule, guard = self.damping.rule, self.guard
        due = rule is not None and self._update_number % rule.every == 0
        ruled = rule(self._lam, verdict.rho, self.proposals.scale) if due else self._lam
        if guard is None:
            return ruled
        norm = model.norm(coefficients)
        raised = guard.raised(self._lam, model, coefficients, verdict.actual, verdict.before, norm)
        return torch.where(
            verdict.whole, ruled, torch.where(verdict.accepted, self._lam * guard.raise_shortened, raised)
        )
