"""The diagonal of the Fisher matrix for parameters that no Kronecker factor covers."""

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature.cotangents import cotangents
from natgrad.layers.mean_only import MeanOnlyBatchNorm
from natgrad.likelihoods import Likelihood
from natgrad.model_view import ModelView, batch_size, select_rows

_EXAMPLES_AT_ONCE = 16


def squared_gradients(
    view: ModelView,
    likelihood: Likelihood,
    x: Any,
    names: tuple[str, ...],
    *,
    expectation: str,
    y: Any = None,
    weight: Tensor | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""``Σ_n Σ_c (J_nᵀ c_n)²`` per parameter: divided by the count, the diagonal of the Fisher matrix.

    One backward pass per example and cotangent, over few examples at a time unless they depend on each other.

    Args:
        view: the model.
        likelihood: p(y | z).
        x: one batch.
        names: of the parameters.
        expectation: as for the factors.
        y: targets, where they are needed.
        weight: per-target weights of the loss.
        samples: draws of y per example.
        generator: the source of the draws.
    """
    size = batch_size(x)
    at_once = size if couples_examples(view.module) else _EXAMPLES_AT_ONCE
    parameters = [view.parameters[name] for name in names]
    totals = [torch.zeros_like(p) for p in parameters]
    for start in range(0, size, at_once):
        rows = slice(start, start + at_once)
        y_rows = None if y is None else select_rows(y, rows)
        w_rows = weight[rows] if weight is not None and weight.ndim and weight.shape[0] == size else weight
        with view.curvature_pass(), view.snapshot(), torch.enable_grad():
            z = view(select_rows(x, rows))
            stacks = cotangents(
                likelihood,
                z.detach(),
                expectation=expectation,
                targets=y_rows,
                weight=w_rows,
                samples=samples,
                generator=generator,
            )
            for cotangent in (c for stack in stacks for c in stack):
                for n in range(z.shape[0]):
                    found = torch.autograd.grad(z[n], parameters, cotangent[n], retain_graph=True, allow_unused=True)
                    for total, gradient in zip(totals, found, strict=True):
                        if gradient is not None:
                            total.add_(gradient.detach().square())
    return dict(zip(names, totals, strict=True))


_COUPLING = (nn.modules.batchnorm._BatchNorm, MeanOnlyBatchNorm)


def couples_examples(model: nn.Module) -> bool:
    """Whether an example's output depends on the other examples: batch normalisation in training mode."""
    return any(isinstance(module, _COUPLING) and module.training for module in model.modules())
