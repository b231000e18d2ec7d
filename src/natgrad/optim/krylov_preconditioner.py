"""A curvature of the library in front of a Krylov solver."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from natgrad.curvature.fisher import STRUCTURES, kronecker_fisher
from natgrad.likelihoods import Likelihood
from natgrad.model_view import ModelView, batch_size, select_rows
from natgrad.optim.arguments import check_whole


class SolverPreconditioner(Protocol):
    """Makes the preconditioner of a step: anything with ``@`` that approximates the inverse of the damped curvature."""

    def __call__(
        self,
        view: ModelView,
        likelihood: Likelihood,
        inputs: Any,
        targets: Any,
        damping: Tensor,
        generator: torch.Generator,
    ) -> Any:
        """The preconditioner at the present parameters.

        Args:
            view: the model.
            likelihood: p(y|z).
            inputs: the batch (its first micro-batch).
            targets: its targets, or None.
            damping: the coefficient of the identity in the system.
            generator: for whatever is drawn.
        """
        ...


@dataclass(frozen=True)
class KroneckerPreconditioner:
    """``(F̆ + damping I)^{-1}`` with a Kronecker-factored F̆ of the batch, made anew at every step.

    Args:
        structure: as for :func:`natgrad.kronecker_fisher`.
        kind: of the inverse; None for the structure's own.
        expectation: over targets, as there.
        rows: at most so many examples, chosen at random, enter the factors.
        uncovered: what stands for parameters without a factor.

    Raises:
        ValueError: an unknown structure, or no rows.
        TypeError: rows that are no whole number.
    """

    structure: str = "block_diagonal"
    kind: str | None = None
    expectation: Any = "sampled"
    rows: int | None = None
    uncovered: Any = "diagonal"

    def __post_init__(self) -> None:
        check_whole(rows=self.rows)
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure={self.structure!r}: expected one of {', '.join(map(repr, STRUCTURES))}")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows={self.rows}: expected a positive number of examples, or None for all")

    def __call__(
        self,
        view: ModelView,
        likelihood: Likelihood,
        inputs: Any,
        targets: Any,
        damping: Tensor,
        generator: torch.Generator,
    ) -> Any:
        """The inverse, as an operator on parameters."""
        size = batch_size(inputs)
        if self.rows is not None and self.rows < size:
            index = torch.randperm(size, generator=generator, device=generator.device)[: self.rows].sort().values
            inputs, targets = select_rows(inputs, index), None if targets is None else select_rows(targets, index)
        needed = self.expectation == "empirical" or getattr(likelihood, "needs_targets", False)
        if needed and targets is None:
            raise ValueError(
                f"preconditioner: {self} needs targets, which metric_inputs have not; use expectation='sampled', or "
                "leave metric_inputs out"
            )
        curvature = kronecker_fisher(
            view.model,
            likelihood,
            inputs,
            structure=self.structure,
            expectation=self.expectation,
            y=targets if needed else None,
            generator=generator,
            forward=view.forward,
            uncovered=self.uncovered,
        )
        return curvature.inverse(damping, self.kind)
