"""Exact curvature without matrices: every product is a few passes of automatic differentiation.

All of them share one form, Jᵀ M J with J the Jacobian of the output z and M a matrix on outputs that couples at most
the elements of one example (and, for a covariance, its mean); only the Hessian has more. Each is the curvature of
exactly the number that ``likelihood.nll(z, y, weight=weight)`` returns.

An operator is a value: it copies the parameters, the buffers and the random state when it is made (so that dropout
draws one set of masks for all its products), keeps the graph of one forward pass, and changes nothing.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from natgrad.likelihoods.base import MeanParametrised
from natgrad.model_view import Forward, ModelView
from natgrad.operators.base import LinearOperator
from natgrad.operators.chain_products import frozen_products
from natgrad.operators.gradient_moments import EmpiricalFisher, GradientCovariance
from natgrad.operators.jacobian_products import JacobianProducts, as_view, batched_grad, differentiable, join_columns
from natgrad.operators.sandwich import JacobianSandwich, check_likelihood

__all__ = ["EmpiricalFisher", "Fisher", "GaussNewton", "GradientCovariance", "Hessian", "Jacobian"]

Space = Literal["logits", "probabilities"]

# Those whose Gauss-Newton matrix in the probabilities is known.
_WITH_MEANS = (Gaussian, Bernoulli, Categorical)


class Jacobian(LinearOperator):
    """J = dz/dθ, ``[z.numel(), P]``; z is flattened with the batch first.

    ``J @ v`` takes a vector over the parameters (or a dict), ``J.T @ u`` a vector shaped like the flattened z.

    Args:
        model: the model, or a `ModelView` of it.
        x: one batch.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError: no trainable parameters, an empty batch, an output that is not finite.
        TypeError: the model's output is no tensor.
    """

    def __init__(
        self, model: nn.Module | ModelView, x: Any, *, forward: Forward | None = None, chunk_size: int | None = None
    ) -> None:
        view = as_view(model, forward)
        self._products = frozen_products(view, x, chunk_size)
        shape = (self._products.z.numel(), view.num_parameters)
        super().__init__(shape, dtype=view.dtype, device=view.device, domain=view)

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "outputs k"]:
        parts = [self._products.jvp(v[:, columns]).flatten(1) for columns in self._products.chunks(v)]
        return torch.cat(parts).to(self.dtype).T

    def _rmatmat(self, u: Float[Tensor, "outputs k"]) -> Float[Tensor, "P k"]:
        shape = self._products.z.shape
        parts = [self._products.vjp(u[:, columns].T.reshape(-1, *shape)) for columns in self._products.chunks(u)]
        return join_columns(parts)


class Fisher(JacobianSandwich):
    """The Fisher information E_x E_{y~p(y|z)}[∇ ∇ᵀ] of p(y|z), exact in y [KFAC, sec. 5; NATGRAD, sec. 3].

    With the normaliser of the likelihood, F = (1/count) Σ_n J_nᵀ w_n F_R(z_n) J_n: no targets are sampled.

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch.
        parametrization: "logits" uses F_R in z; "probabilities" evaluates the same matrix as J_yᵀ D(y) J_y with y the
            mean of p(y|z) [NATGRAD, eqs. 9-13].
        y: the targets, where the curvature depends on them (masks, class weights).
        weight: per-element weights as in ``likelihood.nll``.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError: unknown parametrisation; targets are needed and missing; see also `Jacobian`.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        likelihood: Likelihood,
        x: Any,
        *,
        parametrization: Space = "logits",
        y: Any = None,
        weight: Tensor | None = None,
        forward: Forward | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_likelihood(likelihood)
        _check_space("parametrization", parametrization)
        if y is None and getattr(likelihood, "needs_targets", False):
            raise ValueError(
                f"y: the curvature of {likelihood!r} depends on the targets (masks or class weights); pass y=targets"
            )
        super().__init__(model, likelihood, x, forward, chunk_size)
        self.parametrization = parametrization
        z = self._products.z
        self._count = likelihood.count(z, y, weight)
        self._weight = _curvature_weight(likelihood, z, y, weight)
        if parametrization == "probabilities":
            if not isinstance(likelihood, MeanParametrised):
                raise TypeError(
                    f'likelihood: parametrization="probabilities" needs to_mean and mean_fisher_product, '
                    f"which {type(likelihood).__name__} lacks"
                )
            self._by_mean: MeanParametrised = likelihood
            with differentiable():
                self._logits = z.clone().requires_grad_()
                self._mean = self._by_mean.to_mean(self._logits)

    def _output_product(self, u: Tensor) -> Tensor:
        product = self._in_logits(u) if self.parametrization == "logits" else self._in_probabilities(u)
        if self._weight is not None:
            product = product * self._weight
        return product / self._count

    def _in_logits(self, u: Tensor) -> Tensor:
        z = self._products.z
        if u.shape[0] == 1:  # without the extra dimension: a user's own likelihood need not know of it
            return self.likelihood.fisher_product(z, u[0])[None]
        return self.likelihood.fisher_product(z, u)

    def _in_probabilities(self, u: Tensor) -> Tensor:
        z, to_mean = self._products.z, self._by_mean.to_mean
        tangent = torch.func.vmap(lambda one: torch.func.jvp(to_mean, (z,), (one,))[1])(u)
        metric = self._by_mean.mean_fisher_product(self._mean.detach(), tangent)
        # A saturated output has dy/dz = 0 and 1/y = ∞: its limit is 0.
        metric = torch.where(tangent == 0, torch.zeros_like(metric), metric)
        return batched_grad([self._mean], [self._logits], [metric])[0]


class GaussNewton(JacobianSandwich):
    """The Gauss-Newton matrix of ``nll``: second derivatives of the loss, first derivatives of the model.

    Linearised up to the logits, G = J_zᵀ (∂²nll/∂z²) J_z; with an exponential family in its natural parameters this is
    the Fisher [NATGRAD, sec. 7]. Linearised up to the probabilities f = f(z), G = J_fᵀ (∂²nll/∂f²) J_f [THESIS, table
    3.I] (with the constants of ``nll``: the table's identity belongs to ½‖f − y‖²); the targets appear, as y/f² + (1 −
    y)/(1 − f)² for Bernoulli and y/f² for Categorical outputs, and it is another matrix.

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch.
        y: its targets.
        linearize: "logits" or "probabilities".
        weight: per-element weights as in ``likelihood.nll``.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError: ``linearize`` is unknown, or unknown for this likelihood; see also `Jacobian`.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        likelihood: Likelihood,
        x: Any,
        y: Any,
        *,
        linearize: Space = "logits",
        weight: Tensor | None = None,
        forward: Forward | None = None,
        chunk_size: int | None = None,
    ) -> None:
        _check_space("linearize", linearize)
        if linearize == "probabilities" and not isinstance(likelihood, _WITH_MEANS):
            raise ValueError(
                f'linearize: "probabilities" is known for Gaussian, Bernoulli and Categorical, not for '
                f'{type(likelihood).__name__}; use "logits"'
            )
        super().__init__(model, likelihood, x, forward, chunk_size)
        self.linearize = linearize
        with differentiable():
            self._logits = self._products.z.clone().requires_grad_()
            loss = likelihood.nll(self._logits, y, weight=weight)
            (self._score,) = torch.autograd.grad(loss, self._logits, create_graph=True)

    def _output_product(self, u: Tensor) -> Tensor:
        if self._score.requires_grad:
            product = batched_grad([self._score], [self._logits], [u])[0]
        else:
            product = torch.zeros_like(u)
        if self.linearize == "probabilities" and isinstance(self.likelihood, _WITH_MEANS):
            product = product - _mean_curvature_product(self.likelihood, self._products.z, self._score.detach(), u)
        return product


def _mean_curvature_product(
    likelihood: Gaussian | Bernoulli | Categorical, z: Tensor, score: Tensor, u: Tensor
) -> Tensor:
    """Σ_i (∂nll/∂f_i) (∂²f_i/∂z²) u, what the Hessian in z has beyond J_fᵀ (∂²nll/∂f²) J_f.

    Written in the score ∂nll/∂z instead of ∂nll/∂f, so that no probability is divided by: identity 0; sigmoid
    ∂nll/∂z (1 − 2f); softmax diag(s) − s fᵀ − f sᵀ with s = ∂nll/∂z (its components sum to 0 over the classes).
    """
    if isinstance(likelihood, Gaussian):
        return torch.zeros_like(u)
    f = likelihood.to_mean(z)
    if isinstance(likelihood, Bernoulli):
        return score * (1 - 2 * f) * u
    classes = likelihood.class_dim if likelihood.class_dim < 0 else likelihood.class_dim - z.ndim
    inner_f = (f * u).sum(classes, keepdim=True)
    inner_score = (score * u).sum(classes, keepdim=True)
    return score * u - score * inner_f - f * inner_score


class Hessian(LinearOperator):
    """The Hessian ∂²nll/∂θ² of ``likelihood.nll(model(x), y)``, by differentiating its gradient.

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch.
        y: its targets.
        weight: per-element weights as in ``likelihood.nll``.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError: an operation of the model has no double backward, or a wrong one; see also `Jacobian`.
        TypeError: the likelihood lacks a method.
    """

    def __init__(
        self,
        model: nn.Module | ModelView,
        likelihood: Likelihood,
        x: Any,
        y: Any,
        *,
        weight: Tensor | None = None,
        forward: Forward | None = None,
        chunk_size: int | None = None,
    ) -> None:
        check_likelihood(likelihood)
        view = as_view(model, forward)
        self.likelihood = likelihood
        self._products = JacobianProducts(view, x, chunk_size)
        _check_second_derivatives(self._products.output)
        with differentiable(), view.curvature_pass():
            self._inputs = list(self._products.parameters.values())
            loss = likelihood.nll(self._products.output, y, weight=weight)
            self._gradient = torch.autograd.grad(loss, self._inputs, create_graph=True, materialize_grads=True)
        p = view.num_parameters
        super().__init__((p, p), dtype=view.dtype, device=view.device, domain=view, codomain=view, symmetric=True)

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return join_columns([self._columns(v[:, columns]) for columns in self._products.chunks(v)])

    def _columns(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        products = self._products
        directions = products.split(v).values()
        pairs = [(g, d) for g, d in zip(self._gradient, directions, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(v)
        with torch.inference_mode(False), products.view.curvature_pass():
            try:
                return products.flat(batched_grad([g for g, _ in pairs], self._inputs, [d for _, d in pairs]))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(products.not_differentiable()) from error


def _check_space(name: str, value: str) -> None:
    if value not in ("logits", "probabilities"):
        raise ValueError(f'{name}: expected "logits" or "probabilities", got {value!r}')


def _curvature_weight(likelihood: Likelihood, z: Tensor, y: Any, weight: Tensor | None) -> Tensor | None:
    hook = getattr(likelihood, "curvature_weight", None)
    if hook is not None:
        return hook(z, y, weight)
    if weight is not None:
        raise ValueError(f"weight: {type(likelihood).__name__} has no curvature_weight(z, y, weight) that could use it")
    return None


def _check_second_derivatives(z: Tensor) -> None:
    """Refuses operations whose double backward in PyTorch (2.13) is wrong without a word (finite differences tell)."""
    seen, waiting = set(), [z.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("WeightNormInterfaceBackward"):
            raise ValueError(
                "model: PyTorch's double backward of weight_norm is wrong (its Hessian is not even symmetric); remove "
                "the parametrization first, or use GaussNewton or Fisher, which need no second derivatives of the model"
            )
        waiting.extend(following for following, _ in node.next_functions)
