r"""Updated backpropagation: the top layers move before the signal passes through them [THESIS, ch. 5]. An experiment.

In a layer ``h' = f(a)``, ``a = W h + b``, the signal that reaches h is ``∇_h l = Wᵀ D ∇_f l`` with ``D = f'(a)``. Once
the layer has moved by ΔW and Δb it would be, to first order with ``Δa = ΔW h + Δb``,

    ``∇_h l + ΔWᵀ D ∇_f l + Wᵀ D (∂²l/∂f²) D Δa + Wᵀ (f''(a) ⊙ Δa ⊙ ∇_f l)``.

The thesis prints neither ``∇_h l`` nor D's meaning, and leaves out the last term for its cost: then the error is of
the order of Δ for a curved f, and of Δ² for a piecewise-linear one away from its kinks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from natgrad.likelihoods import Likelihood
from natgrad.model_view import ModelView
from natgrad.operators.chain import Chain
from natgrad.operators.sandwich import check_likelihood
from natgrad.optim.of_model import OptimizerOfModel
from natgrad.optim.stats import Stats

Correction = Literal["none", "weights", "printed", "full"]

# f' and f'' written in the output f
_SLOPES: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    nn.Tanh: (lambda f: 1 - f * f, lambda f: -2 * f * (1 - f * f)),
    nn.Sigmoid: (lambda f: f * (1 - f), lambda f: f * (1 - f) * (1 - 2 * f)),
    nn.ReLU: (lambda f: (f > 0).to(f.dtype), torch.zeros_like),
    nn.Identity: (torch.ones_like, torch.zeros_like),
}


def updated_signal(
    weight: Float[Tensor, "out in"],
    slope: Float[Tensor, "n out"],
    score: Float[Tensor, "n out"],
    dW: Float[Tensor, "out in"],
    da: Float[Tensor, "n out"],
    curvature: Callable[[Tensor], Tensor] | None = None,
    bend: Float[Tensor, "n out"] | None = None,
) -> Float[Tensor, "n in"]:
    r"""``∇_h l (W + ΔW, b + Δb)`` to first order [THESIS, sec. 5.2, with what the print leaves out].

    Args:
        weight: W, before the move.
        slope: ``D = f'(a)``, a diagonal per example.
        score: ``∇_f l`` before the move.
        dW: ΔW, added to W.
        da: ``Δa = ΔW h + Δb``.
        curvature: ``u ↦ (∂²l/∂f²) u`` per example; None leaves the term out.
        bend: ``f''(a)``; None leaves the term out, as the thesis does.
    """
    through = torch.zeros_like(score) if curvature is None else slope * curvature(slope * da)
    if bend is not None:
        through = through + bend * da * score
    return (slope * score) @ (weight + dW) + through @ weight


class UpdatedBackprop(OptimizerOfModel):
    """Gradient descent, layer by layer from the top, on the signal that the moved layers would send [THESIS, ch. 5].

    Every linear layer moves by ``−lr`` times the gradient that its incoming signal gives; then the signal for the
    layer below is corrected by :func:`updated_signal`. ``∂²l/∂f²`` of a hidden layer is that of the layers above it,
    after their move, by a double backward pass per layer: for small networks.

    Args:
        model: an ``nn.Sequential`` of ``nn.Linear`` and Tanh, Sigmoid, ReLU or Identity that ends in a linear layer.
        likelihood: p(y | z).
        lr: the learning rate.
        correction: ``"none"`` (gradient descent), ``"weights"`` (the signal passes through ``W + ΔW``), ``"printed"``
            (and ``∂²l/∂f²``, the thesis' terms) or ``"full"`` (and f'').

    Attributes:
        stats: ``loss``, ``updates``, ``skipped`` (batches whose loss or update was not finite).

    Raises:
        ValueError: another model, an unknown correction, or lr out of range.
    """

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, *, lr: float = 0.01, correction: Correction = "full"
    ) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr={lr}: expected a finite learning rate of at least 0")
        if correction not in get_args(Correction):
            raise ValueError(f"correction={correction!r}: expected one of {', '.join(map(repr, get_args(Correction)))}")
        check_likelihood(likelihood)
        self.view, self.likelihood, self.correction = ModelView(model), likelihood, correction
        chain = Chain.of(self.view)
        if chain is None:
            raise ValueError(
                f"model: {type(self.view.module).__name__} is not an nn.Sequential of trained nn.Linear layers with "
                "Tanh, Sigmoid, ReLU or Identity between them"
            )
        self._chain = chain
        super().__init__(list(self.view.parameters.items()), {"lr": lr, "updates": 0, "skipped": 0})
        self.stats = Stats()

    @torch.no_grad()
    def step(  # pyrefly: ignore[bad-override] - it evaluates the model itself
        self, inputs: Any = None, targets: Any = None, closure: Any = None
    ) -> Float[Tensor, ""]:
        """One sweep from the top layer to the bottom one.

        Args:
            inputs: a batch ``[n, in]``.
            targets: what the likelihood compares z with.
            closure: not supported.

        Returns:
            the loss before the update. Where it or the update is not finite nothing changes.

        Raises:
            TypeError: a closure is given, or inputs are missing.
        """
        if closure is not None or not isinstance(inputs, Tensor):
            raise TypeError("UpdatedBackprop.step(inputs, targets) evaluates the model itself and takes no closure")
        group = self.param_groups[0]
        loss, moved = self._sweep(inputs, targets, float(group["lr"]))
        finite = bool(torch.isfinite(loss)) and all(bool(torch.isfinite(p).all()) for pair in moved for p in pair)
        if finite:
            for layer, (weight, bias) in zip(self._chain.layers, moved, strict=True):
                layer.weight.copy_(weight)
                if layer.bias is not None:
                    layer.bias.copy_(bias)
        group["updates"] += 1
        group["skipped"] += not finite
        self.stats = Stats({"loss": loss, "updates": group["updates"], "skipped": group["skipped"]})
        return loss

    def _sweep(self, x: Tensor, y: Any, lr: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss, and W and b of every layer after the sweep."""
        hidden = [x]
        layers, activations = self._chain.layers, [*self._chain.activations, None]
        for layer, activation in zip(layers, activations, strict=True):
            a = layer(hidden[-1])
            hidden.append(a if activation is None else activation(a))
        moved: list[tuple[Tensor, Tensor]] = []
        loss, score = self._loss(hidden[-1], [], [], y)
        for index in reversed(range(len(layers))):
            layer, h, f = layers[index], hidden[index], hidden[index + 1]
            slope, bend = (part(f) for part in _SLOPES[type(activations[index] or nn.Identity())])
            g = slope * score
            dW, db = -lr * g.T @ h, -lr * g.sum(0)
            bias = torch.zeros_like(db) if layer.bias is None else layer.bias
            db = torch.zeros_like(db) if layer.bias is None else db
            if index:
                above, following = list(moved), activations[index + 1 :]

                def curvature(
                    u: Tensor, f: Tensor = f, above: Sequence[Any] = above, following: Sequence[Any] = following
                ) -> Tensor:
                    return self._curvature(f, above, following, y, u)

                score = updated_signal(
                    layer.weight,
                    slope,
                    score,
                    dW if self.correction != "none" else torch.zeros_like(dW),
                    h @ dW.T + db,
                    curvature if self.correction in ("printed", "full") else None,
                    bend if self.correction == "full" else None,
                )
            moved.insert(0, (layer.weight + dW, bias + db))
        return loss, moved

    def _loss(
        self, f: Tensor, above: Sequence[tuple[Tensor, Tensor]], following: Sequence[nn.Module | None], y: Any
    ) -> tuple[Tensor, Tensor]:
        """The loss from a layer's output on, through the moved layers above it, and its derivative."""
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            loss = self._above(leaf, above, following, y)
            (score,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), score

    def _curvature(
        self,
        f: Tensor,
        above: Sequence[tuple[Tensor, Tensor]],
        following: Sequence[nn.Module | None],
        y: Any,
        u: Tensor,
    ) -> Tensor:
        """``(∂²l/∂f²) u`` per example."""
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            loss = self._above(leaf, above, following, y)
            (score,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (product,) = torch.autograd.grad(score, leaf, u) if score.requires_grad else (torch.zeros_like(u),)
        return product

    def _above(
        self, f: Tensor, above: Sequence[tuple[Tensor, Tensor]], following: Sequence[nn.Module | None], y: Any
    ) -> Tensor:
        for (weight, bias), activation in zip(above, following, strict=True):
            f = functional.linear(f, weight, bias)
            f = f if activation is None else activation(f)
        return self.likelihood.nll(f, y)
