"""What Hessian-free and Krylov subspace descent share: curvature on some examples, a step that h itself confirms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.per_example import PerExampleGradients
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward
from natgrad.operators.gradient_moments import check_examples_apart
from natgrad.optim.arguments import check_real
from natgrad.optim.batches import other_batch
from natgrad.optim.inner_solve import DiagonalPreconditioner
from natgrad.optim.newton import Evaluated, NewtonModel, Part
from natgrad.optim.objective import Curvature, Objective, curvature_name
from natgrad.optim.stats import Stats
from natgrad.optim.whole_model import WholeModelOptimizer

Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class OtherBatch:
    """A batch beside that of the gradient, evaluated.

    Args:
        batches: its (inputs, targets) micro-batches.
        parts: the same, evaluated.
    """

    batches: Batches
    parts: list[Part]


class CurvatureStepOptimizer(WholeModelOptimizer):
    """Evaluates a batch, leaves the step to its subclass, and reports.

    A subclass implements `_update`, and ``step`` through `_evaluate_and_update`.

    Args:
        model: any module.
        likelihood: p(y|z).
        lr: multiplies the step.
        curvature: "gauss_newton" or "metric".
        share: the share of a batch's examples on which the curvature is estimated.
        l2: η of the term ``η/2 ‖θ‖²`` in h.
        exponent: of the diagonal of the empirical Fisher as preconditioner; 0 for none.
        without: the setting that does without that preconditioner, for an error message.
        seed: of the choice of examples.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Raises:
        ValueError: a setting out of range.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float,
        curvature: Curvature,
        share: float,
        l2: float,
        exponent: float,
        without: str,
        seed: int,
        forward: Forward | None,
    ) -> None:
        self._kind = curvature_name(curvature)
        check_real(share=share, l2=l2)
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: expected a number above 0 and up to 1")
        if not 0 <= l2 < math.inf:
            raise ValueError(f"l2={l2}: expected a non-negative number")
        super().__init__(model, likelihood, lr=lr, seed=seed, forward=forward)
        self.share, self.l2 = share, l2
        self._newton = NewtonModel(self.view, likelihood, self._validate)
        self._collect = PerExampleGradients(self.view) if exponent else None
        self._exponent, self._without = exponent, without
        self._previous = torch.zeros(self.view.num_parameters, dtype=self.view.dtype, device=self.view.device)
        self._counts["rejected"] = self._scalar()

    def _vectors(self) -> dict[str, Tensor]:
        return {"previous": self._previous}

    def _update(
        self, objective: Objective, batch: Evaluated, batches: Batches, second: OtherBatch | None
    ) -> dict[str, Any]:
        """From the gradient to new parameters; returns what there is to report.

        Args:
            objective: h on the batch.
            batch: the batch, evaluated; its gradient, which is not zero, holds the l2 term.
            batches: its micro-batches.
            second: the other batch that the caller gave.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement _update")

    def _evaluate_and_update(
        self, inputs: Any, targets: Any, micro_batch_size: int | None, closure: Any, **second: Any
    ) -> Float[Tensor, ""] | None:
        """A whole step; ``second`` names the argument with (inputs, targets) of another batch, or None."""
        batches = self._batches(inputs, targets, micro_batch_size, closure)
        if batches is None:
            return None
        self._check_trainable()
        ((name, pair),) = second.items()
        others = None if pair is None else self._other(name, pair, batches[0][0], micro_batch_size)
        if self._collect is not None:
            check_examples_apart(self.view, f"the preconditioner of single gradients ({self._without} does without)")
        buffers = self._buffers()
        batch = self._newton.evaluate(batches)
        self._count_step(batch.finite, buffers)
        report: dict[str, Any] = {"loss": batch.loss, "accepted": False, "reason": "non_finite", "step_norm": 0.0}
        if bool(batch.finite):
            objective = Objective(self._newton, batch.parts, self.l2)
            objective.add_penalty_(batch.gradient)
            report["reason"] = "zero_gradient"
            if bool(batch.gradient.any()):
                report |= self._update(objective, batch, batches, others)
        numbers = {name: value.clone() for name, value in {**self._numbers(), **self._counts}.items()}
        self.stats = Stats({**report, **numbers, "updates": self._update_number})
        return batch.loss.to(self.view.dtype)

    def _other(self, name: str, pair: Any, inputs: Any, size: int | None) -> OtherBatch:
        """The other batch, before anything of the optimiser or the model has moved; what is wrong with it is named."""
        batches = other_batch(name, pair, inputs, size)
        try:
            return OtherBatch(batches, self._newton.parts(batches))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _diagonal_preconditioner(
        self, batches: Batches, damping: Callable[[Float[Tensor, ""]], Float[Tensor, ""]]
    ) -> Callable[[Tensor], Tensor] | None:
        """The diagonal of the empirical Fisher on some examples, inverted; None where none is asked for.

        Args:
            batches: (inputs, targets) micro-batches.
            damping: from the largest element of the diagonal to what is added to all.
        """
        if self._collect is None:
            return None
        with self.view.snapshot():
            diagonal = DiagonalPreconditioner(self._collect, self.likelihood, batches)
        return diagonal.inverse(damping(diagonal.diagonal.max()), self._exponent)
