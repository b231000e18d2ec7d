"""J v and Jᵀ u of a plain chain of linear layers from its layer inputs: the fast way to the numbers of autodiff.

A Jacobian-vector product does not evaluate the model again. The layouts are those in which the matrix products take
least time: tangents flow column by column with the units first, ``[units, rows]``, so that no product has a transposed
weight; cotangents of a few columns flow together as ``[rows, k, units]``, so that the weights' gradients of all of
them are one product with the layer input (``docs/log.md`` has what else was tried).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.model_view import ModelView, batch_size
from natgrad.operators.chain import Chain
from natgrad.operators.jacobian_products import JacobianProducts, affordable_columns

# So many cotangents flow together on a CPU: more take new memory at every layer, whose pages cost more than is gained.
_TOGETHER = 2


class ChainProducts(JacobianProducts):
    """Products with the Jacobian of a chain.

    Args:
        view: the model.
        chain: what it is.
        inputs: one batch.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.
        copy: hold copies of the parameters and the inputs; otherwise the products are valid as long as both stay what
            they are.

    Attributes:
        z: the output for the batch, detached.
    """

    def __init__(
        self, view: ModelView, chain: Chain, inputs: Tensor, chunk_size: int | None = None, copy: bool = False
    ) -> None:
        self.view, self.inputs, self.chain = view, inputs, chain

        def held(x: Tensor) -> Tensor:
            return x.detach().clone() if copy else x.detach()

        with torch.inference_mode(False), torch.no_grad():
            self._weights = [held(layer.weight) for layer in chain.layers]
            self._biases = [None if layer.bias is None else held(layer.bias) for layer in chain.layers]
            self._layer_inputs: list[Tensor] = []
            a = held(inputs)
            for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
                self._layer_inputs.append(a.flatten(0, -2))
                a = nn.functional.linear(a, weight, bias)
                activation = chain.activations[index] if index < len(chain.activations) else None
                a = a if activation is None else activation(a)
        self.z = self.output = a
        self._units_first: list[Tensor] | None = None
        self.chunk_size = chunk_size or self._affordable_columns_of_chain()
        names = {id(parameter): name for name, parameter in view.parameters.items()}
        self._members = [
            (names[id(layer.weight)], None if layer.bias is None else names[id(layer.bias)]) for layer in chain.layers
        ]

    def jvp(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "k batch ..."]:
        """J v for every column of v, each shaped like z."""
        k, last = v.shape[1], len(self._weights) - 1
        with torch.inference_mode(False), torch.no_grad():
            if self._units_first is None:
                self._units_first = [a.T.contiguous() for a in self._layer_inputs]
            parts = self.view.to_dict(v)
            scratch = v.new_empty(k * max(weight.numel() for weight in self._weights))
            flows: list[Tensor] = []
            for index in range(last):
                weight, (name, bias) = self._weights[index], self._members[index]
                directions = _by_column(parts[name], scratch)
                biases = None if bias is None else parts[bias].T.contiguous()
                for j, direction in enumerate(directions):
                    if biases is None:
                        tangent = direction @ self._units_first[index]
                    else:
                        tangent = torch.addmm(biases[j, :, None], direction, self._units_first[index])
                    if index:
                        tangent.addmm_(weight, flows[j])
                    tangent = self.chain.times_slope(index, tangent, self._units_first[index + 1])
                    flows[j : j + 1] = [tangent]
            found = torch.empty(k, *self.z.shape, dtype=self.z.dtype, device=self.z.device)
            name, bias = self._members[last]
            for j, direction in enumerate(_by_column(parts[name], scratch)):  # these write the rows first
                out = found[j].flatten(0, -2)
                torch.mm(self._layer_inputs[last], direction.T, out=out)
                if bias is not None:
                    out.add_(parts[bias][:, j])
                if last:
                    out.addmm_(flows[j].T, self._weights[last].T)
        return found

    def vjp(self, u: Float[Tensor, "k batch ..."]) -> Float[Tensor, "P k"]:
        """Jᵀ u for every u, each shaped like z."""
        k, outputs = len(u), self.z.shape[-1]
        with torch.inference_mode(False), torch.no_grad():
            found = torch.empty(k, self.view.num_parameters, dtype=self.z.dtype, device=self.z.device)
            if k == 1:
                self._cotangent(u.reshape(-1, outputs), self.view.to_dict(found[0]))
            else:
                together = _TOGETHER if u.device.type == "cpu" else k
                for some, places in zip(u.split(together), found.split(together), strict=True):
                    rows = some.reshape(len(some), -1, outputs).transpose(0, 1).contiguous()
                    self._cotangents(rows, self.view.to_dict(places.T))
        return found.T

    def _cotangent(self, g: Float[Tensor, "rows outputs"], places: dict[str, Tensor]) -> None:
        """Jᵀ u for one u, written where it belongs."""
        for index in reversed(range(len(self._weights))):
            a, (name, bias) = self._layer_inputs[index], self._members[index]
            torch.mm(g.T, a, out=places[name])
            if bias is not None:
                torch.sum(g, 0, out=places[bias])
            if index:
                g = self.chain.times_slope(index - 1, g @ self._weights[index], a)

    def _cotangents(self, g: Float[Tensor, "rows k outputs"], places: dict[str, Tensor]) -> None:
        """The same for several columns, which the places have last."""
        rows, k, _ = g.shape
        scratch = g.new_empty(k * max(weight.numel() for weight in self._weights))
        for index in reversed(range(len(self._weights))):
            weight, a, (name, bias) = self._weights[index], self._layer_inputs[index], self._members[index]
            out, columns = weight.shape
            together = g.view(rows, k * out)
            product = scratch[: k * weight.numel()].view(k * out, columns)
            torch.mm(together.T, a, out=product)
            places[name].movedim(-1, 0).copy_(product.view(k, out, columns))
            if bias is not None:
                places[bias].T.copy_(together.sum(0).view(k, out))
            if index:
                g = (g.view(rows * k, out) @ weight).view(rows, k, columns)
                g = self.chain.times_slope(index - 1, g, a[:, None])

    def _affordable_columns_of_chain(self) -> int:
        widths = sum(a.numel() for a in self._layer_inputs) + self.z.numel()
        return affordable_columns(2 * self.view.num_parameters + 2 * widths, self.z.element_size())


def _by_column(part: Float[Tensor, "out columns k"], scratch: Tensor) -> Float[Tensor, "k out columns"]:
    """The directions of a weight one after the other in memory; ``scratch`` is used where they are not."""
    out, columns, k = part.shape
    if k == 1:
        return part.movedim(-1, 0)
    together = scratch[: part.numel()].view(k, out * columns)
    return together.copy_(part.reshape(out * columns, k).T).view(k, out, columns)


def linearize(view: ModelView, inputs: Any, chain: Chain | None = None) -> JacobianProducts:
    """Products with the Jacobian at the present parameters, the fast way where the model is a chain.

    Those of a chain are for use within one optimiser step: they hold no copy of the parameters.

    Args:
        view: the model.
        inputs: one batch.
        chain: ``Chain.of(view)``, or None.
    """
    return _of_chain(view, chain, inputs, None, copy=False) or JacobianProducts(view, inputs)


def frozen_products(view: ModelView, inputs: Any, chunk_size: int | None = None) -> JacobianProducts:
    """Products with the Jacobian at the parameters of this moment, whatever becomes of the model.

    Args:
        view: the model.
        inputs: one batch.
        chunk_size: how many columns one pass treats; by default as many as fit into about 1 GiB.

    Raises:
        ValueError: an empty batch; an output that is not finite, has no batch dimension or does not depend on the
            parameters; a chunk size below 1.
    """
    if chunk_size is None or chunk_size > 0:  # else the general way says what is wrong
        products = _of_chain(view, Chain.of(view), inputs, chunk_size, copy=True)
        if products is not None and bool(torch.isfinite(products.z).all()):
            return products
    return JacobianProducts(view, inputs, chunk_size)


def _of_chain(
    view: ModelView, chain: Chain | None, inputs: Any, chunk_size: int | None, copy: bool
) -> ChainProducts | None:
    """None where the model is no chain, or where its forward pass for these inputs is not the chain's."""
    if chain is None or not isinstance(inputs, Tensor) or inputs.ndim < 2 or inputs.dtype != view.dtype:
        return None
    if inputs.device != view.device or inputs.shape[-1] != chain.layers[0].in_features or not batch_size(inputs):
        return None
    products = ChainProducts(view, chain, inputs, chunk_size, copy)
    return products if chain.fits(products.z) else None
