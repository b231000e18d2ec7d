"""Hessian-free optimisation: truncated Newton on the Gauss-Newton matrix.

J. Martens, "Deep learning via Hessian-free optimization", ICML 2010; as an implementation of the natural gradient
[NATGRAD, sec. 7].
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.damping_rules import LevenbergMarquardt, check_rule
from natgrad.likelihoods import Likelihood
from natgrad.linalg import Solution, cg, geometric_indices
from natgrad.model_view import Forward
from natgrad.operators.damped import DampedSum
from natgrad.optim.arguments import check_real
from natgrad.optim.batches import share_of
from natgrad.optim.curvature_step import Batches, CurvatureStepOptimizer, OtherBatch
from natgrad.optim.inner_solve import InnerSolve, LineSearch
from natgrad.optim.newton import Evaluated, Part
from natgrad.optim.objective import Curvature, Objective
from natgrad.optim.precision import outside_autocast
from natgrad.quadratic import reduction_ratio, rounding_of


class HessianFree(CurvatureStepOptimizer):
    r"""Steps ``lr α δ`` with ``δ ≈ −(G + (λ + η) I)^{-1} ∇h`` by conjugate gradients (Martens 2010).

    ``h`` is the mean loss plus ``η/2 ‖θ‖²``. The solver starts from the step before and stops where the quadratic model
    M hardly falls any more; of the iterates that it stored, the last one from which going back does not lower h is
    taken; a line search chooses α; and λ follows the Levenberg-Marquardt rule. With ``curvature="metric"`` it is the
    natural gradient: for matching losses the two matrices, and the steps, are the same [NATGRAD, sec. 7, eqs. 14-21].

    Args:
        model: any module.
        likelihood: p(y|z); its ``nll`` is the loss.
        lr: multiplies the step.
        curvature: G: "gauss_newton" (``Jᵀ (∂²nll/∂z²) J``) or "metric" (the Fisher matrix, exact in y).
        damping: λ at the first update (0 stays 0); None for ``start`` times the curvature along the first gradient.
        start: see ``damping``.
        rule: of λ, or None to keep it.
        l2: η.
        share: the share of a batch's examples, chosen at random, on which G is estimated; gradient, h and the line
            search always take all.
        solve: settings of the solver.
        search: the line search, or None to take α = 1 always.
        seed: of the choice of examples.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Attributes:
        stats: of the last update: loss, rho, lambda, iterations (of the solver), taken (the iterate), reason (why the
            solver stopped), alpha, step_norm, accepted; skipped, rejected and updates in all.

    Raises:
        ValueError: a setting out of range.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 1.0,
        curvature: Curvature = "gauss_newton",
        damping: float | None = None,
        start: float = 0.1,
        rule: LevenbergMarquardt | None = LevenbergMarquardt(every=1, decay=2 / 3),
        l2: float = 0.0,
        share: float = 1.0,
        solve: InnerSolve = InnerSolve(),
        search: LineSearch | None = LineSearch(),
        seed: int = 0,
        forward: Forward | None = None,
    ) -> None:
        check_real(damping=0.0 if damping is None else damping, start=start)
        if not isinstance(solve, InnerSolve):
            raise TypeError(f"solve={solve!r}: expected natgrad.InnerSolve(max_iters=30, ...)")
        if search is not None and (isinstance(search, type) or not callable(search)):
            raise TypeError(f"search={search!r}: expected natgrad.LineSearch() or None")
        if damping is not None and not 0 <= damping < math.inf:
            raise ValueError(f"damping={damping}: λ must be a non-negative number, or None for the first batch's")
        check_rule(rule)
        if not 0 < start < math.inf:
            raise ValueError(f"start={start}: expected a positive number, the part of the first curvature that is λ")
        super().__init__(
            model,
            likelihood,
            lr=lr,
            curvature=curvature,
            share=share,
            l2=l2,
            exponent=solve.exponent,
            without="InnerSolve(exponent=0)",
            seed=seed,
            forward=forward,
        )
        self.start, self.rule, self.solve, self.search = start, rule, solve, search
        self._lam = self._scalar(math.nan if damping is None else damping)

    def _numbers(self) -> dict[str, Tensor]:
        return {"lambda": self._lam}

    @torch.no_grad()
    @outside_autocast
    def step(  # pyrefly: ignore[bad-override] - evaluates the model itself
        self,
        inputs: Any = None,
        targets: Any = None,
        micro_batch_size: int | None = None,
        closure: Any = None,
        *,
        curvature_batch: tuple[Any, Any] | None = None,
    ) -> Float[Tensor, ""] | None:
        """Evaluate a batch and update the parameters.

        Args:
            inputs: one batch; or, with ``targets=None``, an iterable of (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: evaluate at most so many examples at a time.
            closure: not supported.
            curvature_batch: (inputs, targets) on which G is estimated, in place of a share of this batch.

        Returns:
            the loss before the update, without the l2 term: a 0-d tensor. Where it or the gradient is not finite, the
            batch is skipped and counted in ``stats["skipped"]``; where the solver or the line search found no step,
            the parameters stay and ``stats["rejected"]`` counts it.

        Raises:
            TypeError: a closure is given, or a curvature batch that is no pair.
            ValueError: inputs or targets that do not fit.
        """
        return self._evaluate_and_update(inputs, targets, micro_batch_size, closure, curvature_batch=curvature_batch)

    def _update(
        self, objective: Objective, batch: Evaluated, batches: Batches, second: OtherBatch | None
    ) -> dict[str, Any]:
        gradient, before = batch.gradient, batch.loss + objective.penalty()
        if second is not None:
            chosen, parts = second.batches, second.parts
        else:
            chosen = share_of(batches, self.share, self._generator)[0]
            parts = batch.parts if self.share == 1 else self._newton.parts(chosen)
        if self._lam.isnan():
            self._lam.copy_(self._first_damping(parts, gradient))
        damped = self._newton.curvature(parts, self._lam + self.l2, self._kind)
        solution = self._solved(damped, gradient, chosen)
        taken, after = self._best_iterate(objective, solution)
        step = solution.iterates[taken] if solution.iterates else solution.x
        # M(δ) − M(0) of the iterate that was taken is known from the solver's own recurrence
        predicted = solution.model_values[taken].to(after.dtype)
        slope = torch.dot(gradient, step)
        damped = self._lam * torch.dot(step, step) / (2 * (predicted - slope))
        rho = reduction_ratio(after - before, predicted, rounding_of(before, self.view.dtype), damped)
        slope = float(slope)
        alpha, reached = 1.0, float(after)
        usable = solution.reason not in ("non_finite", "indefinite_preconditioner") and slope < 0
        if usable and self.search is not None:
            alpha, reached = self.search(lambda scale: float(objective.at(step * scale)), float(before), reached, slope)
        accepted = usable and alpha > 0 and math.isfinite(reached)
        if not usable or math.isnan(float(rho)):
            rho = torch.full_like(rho, -math.inf)
        if self.rule is not None and self._update_number % self.rule.every == 0:
            self._lam.copy_(self.rule(self._lam, rho.to(self._lam.dtype)))
        self._counts["rejected"] += float(not accepted)
        if accepted:
            self._previous.copy_(solution.x)
            self._add(step * alpha)
        else:
            self._previous.zero_()
        return {
            "rho": rho,
            "iterations": solution.iterations,
            "taken": taken,
            "reason": solution.reason,
            "alpha": alpha if accepted else 0.0,
            "step_norm": torch.linalg.vector_norm(step) * alpha if accepted else 0.0,
            "accepted": accepted,
        }

    def _first_damping(self, parts: list[Part], gradient: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """``start`` times the curvature along the gradient; NaN, for the next batch to tell, where it is not finite."""
        along = gradient / gradient.abs().max()  # a gradient may be too large to be squared
        along = along / torch.linalg.vector_norm(along)
        found = torch.dot(along, self._newton.curvature(parts, 0.0, self._kind) @ along)
        return torch.where(torch.isfinite(found), torch.where(found > 0, self.start * found, 1.0), torch.nan)

    def _solved(self, damped: DampedSum, gradient: Float[Tensor, " P"], chosen: Batches) -> Solution:
        """The solver's answer to ``(G + (λ + η) I) δ = −∇h``."""
        settings = self.solve

        def floor(largest: Tensor) -> Tensor:
            return torch.clamp(self._lam + self.l2, min=torch.finfo(gradient.dtype).eps * largest)

        x0 = None
        if settings.warm_start and bool(self._previous.any()):
            x0 = self._previous * settings.warm_start
        return cg(
            damped,
            -gradient,
            tol=1e-10 if gradient.dtype == torch.float64 else 1e-6,
            max_iters=settings.max_iters,
            preconditioner=self._diagonal_preconditioner(chosen, floor),
            x0=x0,
            stop=() if settings.progress is None else settings.progress,
            store=() if settings.store is None else geometric_indices(settings.max_iters, settings.store),
        )

    def _best_iterate(self, objective: Objective, solution: Solution) -> tuple[int, Float[Tensor, ""]]:
        """The last stored iterate from which going back does not lower h [Martens 2010, sec. 4.6], and h there."""
        stored = sorted(solution.iterates)
        best = stored[-1] if stored else solution.iterations
        value = objective.at(solution.iterates[best] if stored else solution.x)
        for i in reversed(stored[:-1]):
            earlier = objective.at(solution.iterates[i])
            if not (earlier < value) and bool(torch.isfinite(value)):
                break
            best, value = i, earlier
        return best, value
