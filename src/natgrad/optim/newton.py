"""What truncated-Newton methods share: one evaluation of a batch, and the curvature around it as an operator.

A step evaluates its batch once and then asks for products with the curvature and for the loss somewhere else: all of
them see the buffers and the dropout masks of that evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.likelihoods import Likelihood, is_plain_sum
from natgrad.linalg import Solution, StoppingRule, cg, minres_qlp
from natgrad.linalg.krylov import all_rules
from natgrad.model_view import ModelView
from natgrad.operators.autodiff import Fisher, GaussNewton
from natgrad.operators.base import LinearOperator
from natgrad.operators.chain import Chain
from natgrad.operators.chain_products import linearize
from natgrad.operators.damped import DampedSum
from natgrad.operators.jacobian_products import JacobianProducts, refuse_sparse
from natgrad.optim.arguments import check_real, check_whole
from natgrad.replay import Replay

CurvatureName = Literal["fisher", "gauss_newton"]


@dataclass(frozen=True)
class KrylovSolver:
    """Which solver finds the step, and when it stops.

    Args:
        name: ``"minres_qlp"`` or ``"cg"``.
        tol: relative to the norm of the gradient; 1e-4 in [NATGRAD, Algorithm 1].
        max_iters: products with the curvature in a step; 20 in [NATGRAD, Algorithm 1].
        stop: further rules, such as :class:`natgrad.linalg.RelativeProgress`.
    """

    name: str = "minres_qlp"
    tol: float = 1e-4
    max_iters: int = 20
    stop: tuple[StoppingRule, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ("minres_qlp", "cg"):
            raise ValueError(f"solver={self.name!r}: expected 'minres_qlp' or 'cg'")
        check_real(tol=self.tol)
        check_whole(max_iters=self.max_iters)
        all_rules(self.tol, self.stop)
        if not self.tol >= 0 or self.max_iters < 1:
            raise ValueError(f"{self}: expected tol >= 0 and max_iters >= 1")

    def __call__(self, operator: LinearOperator, b: Tensor, preconditioner: Any = None, **options: Any) -> Solution:
        """Solve ``operator x = b``."""
        solve = cg if self.name == "cg" else minres_qlp
        return solve(operator, b, self.tol, self.max_iters, preconditioner, stop=self.stop, **options)


@dataclass
class Part:
    """A micro-batch, evaluated.

    Args:
        inputs: of the model.
        targets: None for inputs that only the metric sees.
        replay: buffers and random state of its evaluation.
        count: what the likelihood divides by.
        keep: whether its Jacobian is kept between products; otherwise it is made anew for each.
        products: the Jacobian, where there is one already.
    """

    inputs: Any
    targets: Any
    replay: Replay
    count: Float[Tensor, ""]
    keep: bool = True
    products: JacobianProducts | None = None


@dataclass
class Evaluated:
    """A batch at the present parameters.

    Args:
        loss: the mean nll.
        gradient: its gradient, flat.
        parts: its micro-batches.
        finite: whether loss and gradient are.
    """

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " P"]
    parts: list[Part]
    finite: Bool[Tensor, ""]


@dataclass
class NewtonModel:
    """A model and its likelihood, as truncated-Newton methods see them.

    Args:
        view: the model.
        likelihood: p(y|z).
        validate: called with z and the targets of every micro-batch.
    """

    view: ModelView
    likelihood: Likelihood
    validate: Callable[[Tensor, Any], None] = lambda z, y: None
    chain: Chain | None = field(init=False)

    def __post_init__(self) -> None:
        refuse_sparse(self.view)
        self.chain = Chain.of(self.view)

    def evaluate(self, batches: Sequence[tuple[Any, Any]]) -> Evaluated:
        """Loss and gradient; running statistics and random streams move as in any forward pass of a training loop.

        Args:
            batches: (inputs, targets) micro-batches.
        """
        nll: Tensor | None = None
        gradient: Tensor | None = None
        parts: list[Part] = []
        for inputs, targets in batches:
            replay = self.view.snapshot()
            products = linearize(self.view, inputs, self.chain) if self.chain is not None else None
            if products is not None and type(products) is not JacobianProducts:
                z = products.z
                self.validate(z, targets)
                loss, score = self._loss_and_score(z, targets)
                part_gradient = products.vjp(score[None])[:, 0]
            else:
                products = None
                z, loss, part_gradient = self._by_autograd(inputs, targets)
            count = torch.as_tensor(self.likelihood.count(z, targets), device=z.device).double()
            nll = loss.double() if nll is None else nll + loss.double()
            gradient = part_gradient if gradient is None else gradient.add_(part_gradient)
            keep = len(batches) == 1
            parts.append(Part(inputs, targets, replay, count, keep, products if keep else None))
        assert nll is not None and gradient is not None  # there is at least one batch
        parts = _that_count(parts)
        count = self.total(parts)
        loss, gradient = nll / count, gradient.div_(count.to(gradient.dtype))
        return Evaluated(loss, gradient, parts, torch.isfinite(loss) & torch.isfinite(gradient.sum()))

    def metric_parts(self, batches: Sequence[Any]) -> tuple[list[Part], Bool[Tensor, ""]]:
        """Micro-batches that only the metric sees, and whether their outputs are finite; nothing of the model moves."""
        parts = []
        finite = torch.ones((), dtype=torch.bool, device=self.view.device)
        for inputs in batches:
            replay = self.view.snapshot()
            with replay, torch.no_grad():
                z = self.view(inputs)
            finite = finite & torch.isfinite(z).all()
            count = torch.as_tensor(self.likelihood.count(z), device=z.device).double()
            parts.append(Part(inputs, None, replay, count, keep=len(batches) == 1))
        return parts, finite

    def parts(self, batches: Sequence[tuple[Any, Any]]) -> list[Part]:
        """Micro-batches with targets beside those of the gradient; nothing of the model moves.

        Args:
            batches: (inputs, targets) micro-batches.
        """
        found, keep = [], len(batches) == 1
        for inputs, targets in batches:
            replay = self.view.snapshot()
            if keep:
                products = linearize(self.view, inputs, self.chain)
                z = products.z
            else:
                products = None
                with replay, torch.no_grad():
                    z = self.view(inputs)
            self.validate(z, targets)
            count = torch.as_tensor(self.likelihood.count(z, targets), device=z.device).double()
            found.append(Part(inputs, targets, replay, count, keep, products))
        return _that_count(found)

    def curvature(
        self,
        parts: Sequence[Part],
        damping: Tensor | float,
        kind: CurvatureName = "fisher",
        parametrization: Literal["logits", "probabilities"] = "logits",
    ) -> DampedSum:
        """The curvature of the mean nll over all examples of some parts, plus ``damping I``.

        Args:
            parts: of one batch or of several.
            damping: the coefficient of the identity.
            kind: the Fisher, or the Gauss-Newton matrix (which needs targets).
            parametrization: of the Fisher.
        """
        if kind not in get_args(CurvatureName):
            raise ValueError(f"curvature={kind!r}: expected one of {', '.join(map(repr, get_args(CurvatureName)))}")
        total = self.total(parts)

        def operator(part: Part) -> LinearOperator:
            products = part.products or self._linearized(part)
            if kind == "gauss_newton":
                return GaussNewton(self.view, self.likelihood, products, part.targets)
            return Fisher(self.view, self.likelihood, products, y=part.targets, parametrization=parametrization)

        def source(part: Part) -> Callable[[], LinearOperator]:
            if not part.keep:
                return lambda: operator(part)
            kept = operator(part)
            return lambda: kept

        weights: list[Tensor | float] = [1.0] if len(parts) == 1 else [part.count / total for part in parts]
        return DampedSum(self.view, [source(part) for part in parts], weights, damping)

    def loss_at(self, step: Float[Tensor, " P"], parts: Sequence[Part]) -> Float[Tensor, ""]:
        """The mean nll at θ + step, the same function as was evaluated; the parameters are put back bit for bit."""
        nll = torch.zeros((), dtype=torch.float64, device=step.device)
        with self.displaced(step), torch.no_grad():
            for part in parts:
                with part.replay:
                    z = self.view(part.inputs)
                nll = nll + self.likelihood.nll(z, part.targets, count=1).double()
        return nll / self.total(parts)

    def gradient_at(
        self, step: Float[Tensor, " P"], parts: Sequence[Part]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """As :meth:`loss_at`, and the gradient there."""
        nll = torch.zeros((), dtype=torch.float64, device=step.device)
        gradient = torch.zeros_like(step)
        with self.displaced(step):
            for part in parts:
                with part.replay:
                    _, loss, found = self._by_autograd(part.inputs, part.targets)
                nll, gradient = nll + loss.double(), gradient.add_(found)
        count = self.total(parts)
        return nll / count, gradient.div_(count.to(gradient.dtype))

    @contextmanager
    def displaced(self, step: Float[Tensor, " P"]) -> Iterator[None]:
        """The parameters moved by a step within the block, and put back bit for bit whatever happens there."""
        parameters = list(self.view.parameters.values())
        old = [parameter.detach().clone() for parameter in parameters]
        try:
            torch._foreach_add_([p.data for p in parameters], list(self.view.to_dict(step).values()))
            yield
        finally:
            torch._foreach_copy_([p.data for p in parameters], old)

    def total(self, parts: Sequence[Part]) -> Float[Tensor, ""]:
        """What the nll of all parts together is divided by."""
        if is_plain_sum(self.likelihood):
            return parts[0].count
        return torch.stack([part.count for part in parts]).sum()

    def _linearized(self, part: Part) -> JacobianProducts:
        with part.replay:
            return linearize(self.view, part.inputs, self.chain)

    def _loss_and_score(self, z: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            loss = self.likelihood.nll(leaf, targets, count=1)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def _by_autograd(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            z = self.view(inputs)
            self.validate(z.detach(), targets)
            loss = self.likelihood.nll(z, targets, count=1)
        if not loss.requires_grad:
            raise ValueError(
                "model: the output does not depend on any trainable parameter; if forward= is given, it must call the "
                "model that it receives, without torch.no_grad() and without a copy of its own"
            )
        found = torch.autograd.grad(loss, list(self.view.parameters.values()), materialize_grads=True)
        flat = torch.cat([g.reshape(-1).to(self.view.dtype) for g in found])
        return z.detach(), loss.detach(), flat


def _that_count(parts: list[Part]) -> list[Part]:
    """Without micro-batches in which no target counts: of a mean over none there is no curvature."""
    if len(parts) == 1:
        return parts
    counts = torch.stack([part.count for part in parts]).tolist()
    return [part for part, count in zip(parts, counts, strict=True) if count] or parts
