"""J v and Jᵀ u of a plain chain of linear layers from its layer inputs: the fast way to the numbers of autodiff.

A Jacobian-vector product does not evaluate the model again, a vector-Jacobian product writes into one flat vector. For
use within one optimiser step: unlike `JacobianProducts`, this holds no copy of the parameters.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.model_view import ModelView
from natgrad.operators.chain import Chain
from natgrad.operators.jacobian_products import JacobianProducts


class ChainProducts(JacobianProducts):
    """Products with the Jacobian of a chain, valid as long as its parameters stay what they are.

    Args:
        view: the model.
        chain: what it is.
        inputs: one batch.

    Attributes:
        z: the output for the batch, detached.
    """

    def __init__(self, view: ModelView, chain: Chain, inputs: Any) -> None:
        self.view, self.inputs, self.chain = view, inputs, chain
        self._layer_inputs: dict[str, Tensor] = {}
        with torch.no_grad():
            a = inputs
            for index, (name, layer) in enumerate(zip(chain.names, chain.layers, strict=True)):
                self._layer_inputs[name] = a
                a = layer(a)
                activation = chain.activations[index] if index < len(chain.activations) else None
                a = a if activation is None else activation(a)
        self.z = self.output = a
        self.chunk_size = self._affordable_columns_of_chain()
        names = {id(parameter): name for name, parameter in view.parameters.items()}
        self._members = {
            name: (names[id(layer.weight)], None if layer.bias is None else names[id(layer.bias)])
            for name, layer in zip(chain.names, chain.layers, strict=True)
        }

    def jvp(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "k batch ..."]:
        """J v for every column of v, each shaped like z."""
        directions = []
        for column in v.T:
            parts = self.view.to_dict(column)
            directions.append(
                {name: (parts[w], None if b is None else parts[b]) for name, (w, b) in self._members.items()}
            )
        return torch.stack(self.chain.tangents(self._layer_inputs, directions)).view(-1, *self.z.shape)

    def vjp(self, u: Float[Tensor, "k batch ..."]) -> Float[Tensor, "P k"]:
        """Jᵀ u for every u, each shaped like z."""
        rows = torch.empty(len(u), self.view.num_parameters, dtype=self.z.dtype, device=self.z.device)
        for row, cotangent in zip(rows, u, strict=True):
            places = self.view.to_dict(row)
            for name, g in self.chain.output_gradients(self._layer_inputs, cotangent).items():
                weight, bias = self._members[name]
                g = g.flatten(0, -2)
                torch.mm(g.T, self._layer_inputs[name].flatten(0, -2), out=places[weight])
                if bias is not None:
                    torch.sum(g, 0, out=places[bias])
        return rows.T

    def _affordable_columns_of_chain(self) -> int:
        widths = sum(a.numel() for a in self._layer_inputs.values()) + self.z.numel()
        return max(1, 2**30 // (self.z.element_size() * (2 * self.view.num_parameters + 2 * widths)))


def linearize(view: ModelView, inputs: Any, chain: Chain | None = None) -> JacobianProducts:
    """Products with the Jacobian at the present parameters, the fast way where the model is a chain.

    Args:
        view: the model.
        inputs: one batch.
        chain: ``Chain.of(view)``, or None.
    """
    if chain is not None and isinstance(inputs, Tensor) and inputs.ndim >= 2 and inputs.dtype == view.dtype:
        products = ChainProducts(view, chain, inputs)
        if chain.fits(products.z) and products.z.device == inputs.device:
            return products
    return JacobianProducts(view, inputs)
