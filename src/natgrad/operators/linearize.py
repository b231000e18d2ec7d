"""The linearised forward pass of any model: z and J v for a few parameter directions at once [KFAC, app. C].

Plain chains of linear layers have a faster way to the same numbers, :mod:`natgrad.operators.chain`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.model_view import ModelView


def jacobian_products(
    view: ModelView, inputs: Any, directions: Sequence[Mapping[str, Tensor]]
) -> tuple[Float[Tensor, "batch ..."], list[Tensor]]:
    """z and ``J v`` for each direction v, for any model, by forward-mode differentiation vmapped over the directions.

    Args:
        view: the model, at the parameters where J is taken.
        inputs: one batch.
        directions: dicts keyed by parameter name.
    """
    parameters = {name: parameter.detach() for name, parameter in view.parameters.items()}

    def outputs(values: Mapping[str, Tensor]) -> Tensor:
        return view.functional(values, inputs)

    def one(direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        z, tangent, *_ = torch.func.jvp(outputs, (parameters,), (direction,))
        return z, tangent

    with view.curvature_pass():
        if len(directions) == 1:
            z, tangent = one(directions[0])
            return z, [tangent]
        stacked = {name: torch.stack([direction[name] for direction in directions]) for name in parameters}
        z, tangents = torch.func.vmap(one, randomness="same")(stacked)
    return z[0], list(tangents.unbind(0))
