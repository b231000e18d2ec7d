"""Krylov subspace descent: L-BFGS in the subspace that the curvature spans from the gradient.

O. Vinyals, D. Povey, "Krylov Subspace Descent for Deep Learning", AISTATS 2012; as an implementation of the natural
gradient [NATGRAD, sec. 7].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood
from natgrad.linalg.krylov_basis import krylov_basis
from natgrad.model_view import Forward
from natgrad.optim.arguments import check_whole
from natgrad.optim.batches import share_of
from natgrad.optim.curvature_step import Batches, CurvatureStepOptimizer, OtherBatch
from natgrad.optim.newton import Evaluated
from natgrad.optim.objective import Curvature, Objective
from natgrad.optim.precision import outside_autocast


@dataclass(frozen=True)
class SubspaceSearch:
    """The subspace of a step and the search in it.

    Args:
        size: dimensions of the Krylov subspace; the step before adds one more.
        exponent: of the diagonal of the empirical Fisher by which the subspace is preconditioned; 0 for none.
        floor: eigenvalues of G on the subspace below this share of the largest are raised to it, and so are elements
            of that diagonal.
        iterations: of L-BFGS.
        evaluations: of h and ∇h in one search, at most about so many.
    """

    size: int = 20
    exponent: float = 1.0
    floor: float = 1e-4
    iterations: int = 20
    evaluations: int = 30

    def __post_init__(self) -> None:
        check_whole(size=self.size, iterations=self.iterations, evaluations=self.evaluations)
        for name in ("size", "iterations", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"SubspaceSearch({name}={getattr(self, name)}): expected at least 1")
        if not 0 <= self.exponent <= 1 or not 0 < self.floor < 1:
            raise ValueError(f"{self}: expected an exponent from 0 to 1 and a floor between 0 and 1, such as 1e-4")


class KrylovDescent(CurvatureStepOptimizer):
    r"""Steps ``lr δ`` where δ minimises h on other examples, within ``span{g, G g, …, G^{k−1} g, δ₀}``.

    g is the gradient of the batch, G the Gauss-Newton matrix or the metric on a share of it, δ₀ the step before. The
    subspace is made orthonormal and scaled so that G is the identity on it; PyTorch's L-BFGS then minimises h on a
    second batch over its few coordinates (Vinyals and Povey 2012). Nothing is damped: what the second batch does not
    confirm is not done.

    Args:
        model: any module.
        likelihood: p(y|z); its ``nll`` is the loss.
        lr: multiplies the step.
        curvature: G: "gauss_newton" or "metric"; the same for matching losses [NATGRAD, sec. 7].
        share: the share of a batch's examples, chosen at random, on which G is estimated; the others are the second
            batch, all of them where the share is 1.
        l2: η of the term ``η/2 ‖θ‖²`` in h.
        search: the subspace and the search in it.
        seed: of the choice of examples.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Attributes:
        stats: of the last update: loss, dimension (of the subspace), evaluations (of h on the second batch), reduction
            (of h there), step_norm, accepted, reason ("searched", "no_decrease", "zero_gradient"; "non_finite": loss,
            gradient or h on the second batch; "non_finite_products"); skipped, rejected and updates in all.

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
        share: float = 0.25,
        l2: float = 0.0,
        search: SubspaceSearch = SubspaceSearch(),
        seed: int = 0,
        forward: Forward | None = None,
    ) -> None:
        if not isinstance(search, SubspaceSearch):
            raise TypeError(f"search={search!r}: expected natgrad.SubspaceSearch(size=20, ...)")
        super().__init__(
            model,
            likelihood,
            lr=lr,
            curvature=curvature,
            share=share,
            l2=l2,
            exponent=search.exponent,
            without="SubspaceSearch(exponent=0)",
            seed=seed,
            forward=forward,
        )
        self.search = search

    @torch.no_grad()
    @outside_autocast
    def step(  # pyrefly: ignore[bad-override] - evaluates the model itself
        self,
        inputs: Any = None,
        targets: Any = None,
        micro_batch_size: int | None = None,
        closure: Any = None,
        *,
        search_batch: tuple[Any, Any] | None = None,
    ) -> Float[Tensor, ""] | None:
        """Evaluate a batch and update the parameters.

        Args:
            inputs: one batch; or, with ``targets=None``, an iterable of (inputs, targets) micro-batches.
            targets: what the likelihood compares z with.
            micro_batch_size: evaluate at most so many examples at a time.
            closure: not supported.
            search_batch: (inputs, targets) of the second batch, in place of the rest of this one.

        Returns:
            the loss before the update, without the l2 term: a 0-d tensor. Where it or the gradient is not finite, the
            batch is skipped and counted in ``stats["skipped"]``; where the search does not lower h, the parameters
            stay and ``stats["rejected"]`` counts it.

        Raises:
            TypeError: a closure is given, or a second batch that is no pair.
            ValueError: inputs or targets that do not fit.
        """
        return self._evaluate_and_update(inputs, targets, micro_batch_size, closure, search_batch=search_batch)

    def _update(
        self, objective: Objective, batch: Evaluated, batches: Batches, second: OtherBatch | None
    ) -> dict[str, Any]:
        gradient = batch.gradient
        chosen, others = share_of(batches, self.share, self._generator)
        parts = self._newton.parts(chosen) if others else batch.parts
        G = self._newton.curvature(parts, self.l2, self._kind)
        settings = self.search

        def floor(largest: Tensor) -> Tensor:
            return settings.floor * largest + self.l2 + torch.finfo(gradient.dtype).tiny

        preconditioner = self._diagonal_preconditioner(chosen, floor)
        extra = self._previous if bool(self._previous.any()) else None
        basis = krylov_basis(lambda v: G @ v, gradient, settings.size, preconditioner, extra)
        if not bool(torch.isfinite(basis.matrix).all()):
            self._counts["rejected"] += 1
            self._previous.zero_()
            return {"reason": "non_finite_products", "dimension": 0, "evaluations": 0, "reduction": 0.0}
        directions = basis.whitened(settings.floor)
        if second is not None or others:
            objective = Objective(self._newton, second.parts if second else self._newton.parts(others), self.l2)
        coordinates, values = self._minimise(objective, directions)
        step = directions @ coordinates.to(directions.dtype)
        reduction = values[0] - min(values) if math.isfinite(values[0]) else 0.0
        accepted = reduction > 0
        self._counts["rejected"] += float(not accepted)
        self._previous.copy_(step) if accepted else self._previous.zero_()
        if accepted:
            self._add(step)
        return {
            "reason": "searched" if accepted else "no_decrease" if math.isfinite(values[0]) else "non_finite",
            "dimension": basis.rank,
            "evaluations": len(values),
            "reduction": reduction,
            "accepted": accepted,
            "step_norm": torch.linalg.vector_norm(step) if accepted else 0.0,
        }

    def _minimise(
        self, objective: Objective, directions: Float[Tensor, "P k"]
    ) -> tuple[Float[Tensor, " k"], list[float]]:
        """The coordinates of the least h that L-BFGS met, and h at all that it evaluated, the first one being 0."""
        real = self._scalar().dtype
        best = torch.zeros(directions.shape[1], dtype=real, device=directions.device)

        def evaluate(at: Float[Tensor, " k"]) -> tuple[float, Float[Tensor, " k"]]:
            h, gradient = objective.gradient_at(directions @ at.to(directions.dtype))
            return float(h), (gradient @ directions).to(real)

        known: list[tuple[float, Float[Tensor, " k"]]] = [evaluate(best)]
        unit = _unit(*known[0], torch.finfo(directions.dtype).eps)
        a = torch.zeros_like(best, requires_grad=True)
        lbfgs = torch.optim.LBFGS(
            [a],
            max_iter=self.search.iterations,
            max_eval=self.search.evaluations,
            history_size=self.search.iterations,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        values: list[float] = []

        def closure() -> float:
            at = unit * a.detach()
            h, gradient = known.pop() if known else evaluate(at)
            values.append(h)
            if math.isfinite(values[-1]) and values[-1] == min(v for v in values if math.isfinite(v)):
                best.copy_(at)
            a.grad = gradient / unit
            return values[-1] / unit**2

        lbfgs.step(closure)  # type: ignore[bad-argument-type]  # a number is enough
        return best, [v if math.isfinite(v) else math.inf for v in values]


def _unit(h: float, gradient: Float[Tensor, " k"], eps: float) -> float:
    """What L-BFGS takes for 1, for its tolerances are absolute: |∇h|₁ where that is less and h can show the decrease.

    With coordinates in this unit, and h in its square, the first step and all others stay what they are.
    """
    size = float(gradient.abs().sum())
    return size if eps * abs(h) < size**2 < 1 else 1.0
