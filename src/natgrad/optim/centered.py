"""Centred gradient descent."""

from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward
from natgrad.optim.layerwise import BatchPass, LayerwiseOptimizer, Wanted


class CenteredSGD(LayerwiseOptimizer):
    r"""Gradient descent with the weights' gradient taken at centred inputs [THESIS, sec. 6.4.1, Algorithm 2].

    ``W ← W − lr E[∇_a l (h − h̄)ᵀ]`` and ``b ← b − lr E[∇_a l]``, h̄ the mean of the layer's input over the minibatch
    (the thesis prints a plus). The forward pass is that of the model: nothing is reparametrised. By hand it is a
    correction of rank one, ``∇W − ∇b h̄ᵀ``, so that an update costs what one of SGD costs::

        optimizer = ng.CenteredSGD(model, likelihood, lr=0.1)
        loss = optimizer.step(x, y)

    A layer without a trained bias keeps its plain gradient: centring is what remains of the bias in the inverse of
    the layer's block [NOTE, sec. 3.2]. So does a parameter outside of ``nn.Linear`` layers.

    Args:
        model: any module.
        likelihood: p(y | z); the loss is ``likelihood.nll``.
        lr: the learning rate.
        momentum: of the centred gradient, as in ``torch.optim.SGD`` without dampening; 0 in the thesis.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit.

    Attributes:
        stats: of the last step: ``loss``, ``updates``, ``skipped``.

    Raises:
        ValueError: ``lr`` or ``momentum`` out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 0.01,
        momentum: float = 0.0,
        forward: Forward | None = None,
    ) -> None:
        super().__init__(model, likelihood, lr=lr, momentum=momentum, forward=forward, uncovered="identity")

    def _wanted(self, update: int) -> Wanted:
        return Wanted()

    def _update(self, update: int, batch: BatchPass, finite: Bool[Tensor, ""]) -> dict[str, Any]:
        for name, _, dW, db in self._layer_gradients(batch):
            if dW is not None and db is not None:
                dW.addr_(db, batch.layers[name].mean.to(dW.dtype), alpha=-1)
        directions = {name: g for name, g in batch.gradients.items() if g is not None}
        self._descend(directions, finite)
        return {}
