"""Natural gradient by truncated Newton: [NATGRAD, Algorithm 1], the metric never written out."""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.damping_rules import LevenbergMarquardt, check_rule
from natgrad.likelihoods import Likelihood
from natgrad.linalg import Solution
from natgrad.model_view import Forward, batch_size, select_rows
from natgrad.operators.damped import DampedSum
from natgrad.optim.arguments import check_real
from natgrad.optim.batches import check_same_form
from natgrad.optim.krylov_preconditioner import KroneckerPreconditioner, SolverPreconditioner
from natgrad.optim.newton import Evaluated, KrylovSolver, NewtonModel, Part
from natgrad.optim.precision import outside_autocast
from natgrad.optim.stats import Stats
from natgrad.optim.whole_model import WholeModelOptimizer
from natgrad.quadratic import reduction_ratio, rounding_of

Ratio = Literal["quadratic", "linear", "published"]
Space = Literal["logits", "probabilities"]

# A smaller relative rise of a loss in single precision may be rounding.
_ROUNDING = 1e-6


class NaturalGradient(WholeModelOptimizer):
    r"""Steps ``−lr (G + λ I)^{-1} ∇h`` with G the Fisher metric of p(y|z), by a Krylov solver [NATGRAD, Algorithm 1].

    ``h`` is the mean nll plus ``η/2 ‖θ‖²`` (η is ``l2``; it adds ``η I`` to G). G is that of the batch, or of other
    inputs: it needs no targets. λ follows the Levenberg-Marquardt rule on the reduction ratio ρ of the step δ, which
    compares the change of h on the batch with what was foretold:

    - ``ratio="quadratic"``: by ``∇h·δ + ½ δᵀ(G + (λ + η) I) δ``;
    - ``"linear"``: [NATGRAD, eq. 30], ``∇h·δ``, with ρ divided by ``1 − lr/2``: on a quadratic h an exact solution then
      has ρ = 1 at every lr (below 2);
    - ``"published"``: eq. 30 as it stands; at lr = 1 it never lowers λ.

    Args:
        model: any module.
        likelihood: p(y|z); its ``nll`` is the loss.
        solver: ``"minres_qlp"``, ``"cg"`` or a :class:`KrylovSolver` with its tolerance and number of iterations.
        lr: multiplies the solution; any ``lr_scheduler`` works, such as
            :class:`natgrad.training.HyperbolicDecay`.
        damping: λ at the first update, without η; 0 stays 0, whatever the rule.
        rule: moves λ every so many updates, and after a step that was undone at once; None keeps it.
        ratio: see above.
        guard: undo a step that raises the loss of its own batch (and let the rule raise λ).
        l2: η.
        preconditioner: of the solver: a structure of :func:`natgrad.kronecker_fisher` such as ``"block_diagonal"``
            (K-FAC), a :class:`KroneckerPreconditioner`, your own function of that kind, or a fixed operator with ``@``.
        parametrization: of the metric: "logits" or "probabilities", which give the same numbers.
        seed: of the optimiser's own random stream, for preconditioners that sample.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Attributes:
        stats: of the last step: loss, rho, lambda, iterations, reason (why the solver stopped), relative_residual,
            step_norm, accepted, products; skipped, rejected and updates in all.

    Raises:
        ValueError: a setting out of range.
        TypeError: the likelihood has no metric, for it lacks a method.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        solver: str | KrylovSolver = "minres_qlp",
        lr: float = 1.0,
        damping: float = 1.0,
        rule: LevenbergMarquardt | None = LevenbergMarquardt(every=1, decay=2 / 3),
        ratio: Ratio = "quadratic",
        guard: bool = True,
        l2: float = 0.0,
        preconditioner: str | SolverPreconditioner | Any = None,
        parametrization: Space = "logits",
        seed: int = 0,
        forward: Forward | None = None,
    ) -> None:
        check_real(damping=damping, l2=l2)
        for name, value in (("damping", damping), ("l2", l2)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a finite number of at least 0")
        check_rule(rule)
        if ratio not in get_args(Ratio):
            raise ValueError(f"ratio={ratio!r}: expected one of {', '.join(map(repr, get_args(Ratio)))}")
        if parametrization not in ("logits", "probabilities"):
            raise ValueError(f'parametrization={parametrization!r}: expected "logits" or "probabilities"')
        if isinstance(preconditioner, str):
            preconditioner = KroneckerPreconditioner(preconditioner)
        if preconditioner is not None and not (callable(preconditioner) or hasattr(preconditioner, "__matmul__")):
            raise TypeError(
                f"preconditioner: expected a structure such as 'block_diagonal', a function or an operator with @, got "
                f"{type(preconditioner).__name__}"
            )
        super().__init__(model, likelihood, lr=lr, seed=seed, forward=forward)
        self.solver = solver if isinstance(solver, KrylovSolver) else KrylovSolver(solver)
        self.rule, self.ratio, self.guard, self.l2 = rule, ratio, guard, l2
        self.preconditioner = preconditioner
        self.parametrization: Space = parametrization
        self._newton = NewtonModel(self.view, likelihood, self._validate)
        self._lam = self._scalar(damping)
        self._counts["rejected"] = self._scalar()

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
        metric_inputs: Any = None,
        join: bool = False,
    ) -> Float[Tensor, ""] | None:
        """Evaluate a mini-batch and update the parameters.

        Args:
            inputs: one batch; or, with ``targets=None``, an iterable of (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: evaluate at most so many examples at a time.
            closure: not supported.
            metric_inputs: the metric is that of these inputs instead of the batch's: another batch, or data without
                targets. The gradient stays that of the batch.
            join: the metric is that of the batch and of ``metric_inputs`` together.

        Returns:
            the loss before the update, without the l2 term: a 0-d tensor. Where the loss, the gradient or a product is
            not finite, the batch is skipped and counted in ``stats["skipped"]``: parameters, buffers and λ stay as they
            were. A gradient of zero gives no step (``stats["reason"] == "zero_rhs"``).

        Raises:
            TypeError: a closure is given.
            ValueError: inputs, targets or metric inputs that do not fit.
        """
        batches = self._batches(inputs, targets, micro_batch_size, closure)
        if batches is None:
            return None
        self._check_trainable()
        lr = self._learning_rate()
        metric, finite = self._metric_parts(metric_inputs, join, batches[0][0], micro_batch_size)
        buffers = self._buffers()
        batch = self._newton.evaluate(batches)
        finite = finite & batch.finite
        if not bool(finite):
            self._count_step(finite, buffers)
            self._report(batch, None, None, {})
            return batch.loss.to(self.view.dtype)
        parts = batch.parts if metric is None else metric + batch.parts if join else metric
        theta = torch.cat([p.detach().reshape(-1) for p in self.view.parameters.values()]) if self.l2 else None
        if theta is not None:
            batch.gradient.add_(theta, alpha=self.l2)
        operator = self._newton.curvature(parts, self._lam + self.l2, parametrization=self.parametrization)
        solution = self.solver(operator, batch.gradient, self._made_preconditioner(parts[0]))
        finite = finite & torch.full_like(finite, solution.reason != "non_finite")
        step = torch.where(finite, -solution.x, torch.zeros_like(solution.x))
        accepted, rho, lam = self._judge(batch, solution, step, lr, theta)
        accepted = accepted & finite
        step = torch.where(accepted, step, torch.zeros_like(step))
        self._add(step)
        self._lam.copy_(torch.where(finite, lam, self._lam))
        self._count_step(finite, buffers)
        self._counts["rejected"] += finite & ~accepted
        found = {"rho": rho, "step_norm": lr * torch.linalg.vector_norm(step), "accepted": accepted}
        self._report(batch, solution, operator, found)
        return batch.loss.to(self.view.dtype)

    def _judge(
        self, batch: Evaluated, solution: Solution, step: Tensor, lr: float, theta: Tensor | None
    ) -> tuple[Bool[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """Whether a step is good enough, its ρ, and the new λ."""
        if self.rule is None and not self.guard:
            return torch.ones_like(batch.finite), self._scalar(math.nan), self._lam
        slope = torch.dot(batch.gradient, step).double()
        # without a product: (G + damping I) x = gradient − residual
        curvature = -torch.dot(step, batch.gradient - solution.residual).double()
        if self.ratio == "quadratic":
            predicted = lr * slope + 0.5 * lr**2 * curvature
        else:
            predicted = lr * slope * (1 - lr / 2 if self.ratio == "linear" else 1)
        actual = self._newton.loss_at(lr * step, batch.parts) - batch.loss
        if theta is not None:  # η/2 (‖θ + δ‖² − ‖θ‖²)
            delta = lr * step
            actual = actual + self.l2 * torch.dot(delta, theta + 0.5 * delta).double()
        damped = self._lam * torch.dot(step, step) / curvature
        rho = reduction_ratio(actual, predicted, rounding_of(batch.loss, self.view.dtype), damped)
        accepted = torch.isfinite(actual)
        if self.guard:
            accepted = accepted & (actual <= _ROUNDING * batch.loss.abs())
        if self.rule is None:
            return accepted, rho, self._lam
        # An undone step raises λ whatever was foretold; one that the model itself forbids (lr > 2) says nothing of λ.
        due = (self._update_number + 1) % self.rule.every == 0
        telling = torch.where(predicted < 0, rho, 0.5) if due else torch.full_like(rho, 0.5)
        return accepted, rho, self.rule(self._lam, torch.where(accepted, telling, -1.0))

    def _learning_rate(self) -> float:
        lr = float(self.param_groups[0]["lr"])
        if self.ratio == "linear" and lr >= 2 and (self.rule is not None):
            raise ValueError(
                f'lr={lr}: with ratio="linear" expected less than 2 (a quadratic h does not fall at twice the exact '
                'step); use ratio="quadratic" or "published", or rule=None'
            )
        return lr

    def _metric_parts(
        self, metric_inputs: Any, join: bool, inputs: Any, size: int | None
    ) -> tuple[list[Part] | None, Bool[Tensor, ""]]:
        """The micro-batches of other metric inputs, None without such, and whether their outputs are finite."""
        if metric_inputs is None:
            if join:
                raise ValueError("join: needs metric_inputs, which the metric shall be of beside the batch")
            return None, torch.ones((), dtype=torch.bool, device=self.view.device)
        if getattr(self.likelihood, "needs_targets", False):
            raise ValueError(
                f"metric_inputs: the metric of {self.likelihood!r} depends on targets (masks or class weights), which "
                "these inputs have not; leave metric_inputs out"
            )
        rows = batch_size(metric_inputs, "metric_inputs")
        check_same_form("metric_inputs", metric_inputs, inputs)
        pieces = [slice(i, i + size) for i in range(0, rows, size)] if size and size < rows else [None]
        try:
            return self._newton.metric_parts(
                [metric_inputs if piece is None else select_rows(metric_inputs, piece) for piece in pieces]
            )
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"metric_inputs: {error}") from error

    def _made_preconditioner(self, part: Part) -> Any:
        made = self.preconditioner
        if made is None or hasattr(made, "__matmul__"):
            return made
        damping = self._lam + self.l2
        return made(self.view, self.likelihood, part.inputs, part.targets, damping, self._generator)

    def _report(
        self, batch: Evaluated, solution: Solution | None, operator: DampedSum | None, found: dict[str, Any]
    ) -> None:
        self.stats = Stats(
            {
                "loss": batch.loss,
                "rho": math.nan,
                "lambda": self._lam.clone(),
                "iterations": 0 if solution is None else solution.iterations,
                "reason": "non_finite" if solution is None else solution.reason,
                "relative_residual": math.nan if solution is None else solution.relative_residual,
                "products": 0 if operator is None else operator.products,
                "step_norm": 0.0,
                "accepted": False,
                **found,
                **{name: count.clone() for name, count in self._counts.items()},
                "updates": self._update_number,
            }
        )
