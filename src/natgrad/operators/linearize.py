"""The linearised forward pass: z and J v for a few parameter directions at once [KFAC, app. C].

A plain chain of ``nn.Linear`` and elementwise activations is linearised by hand, from the layer inputs that the forward
pass stored anyway; any other model goes through forward-mode automatic differentiation. Both give the same numbers (a
test).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.model_view import ModelView

# dφ/ds written in the output φ(s): these activations can be linearised without keeping s
_DERIVATIVE_FROM_OUTPUT: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: lambda out: 1 - out * out,
    nn.Sigmoid: lambda out: out - out * out,
    nn.ReLU: lambda out: (out > 0).to(out.dtype),
    nn.Identity: torch.ones_like,
}


class Chain:
    """A model that is exactly Linear (activation Linear)*: what the fast linearisation needs to know.

    Args:
        layers: clean names of the linear layers, in order.
        activations: the module between layer i and layer i + 1, or None where there is none.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[nn.Linear], activations: Sequence[nn.Module | None]
    ) -> None:
        self.names, self.layers, self.activations = tuple(names), tuple(layers), tuple(activations)

    @classmethod
    def of(cls, view: ModelView) -> "Chain | None":
        """The chain that this model is, or None where it is anything else."""
        model = view.module
        if type(model) is not nn.Sequential or view.forward is not None:
            return None
        leaves = list(_leaves(model))
        if not leaves or type(leaves[0][1]) is not nn.Linear or type(leaves[-1][1]) is not nn.Linear:
            return None
        names: list[str] = []
        layers: list[nn.Linear] = []
        activations: list[nn.Module | None] = []
        pending: nn.Module | None = None
        for name, leaf in leaves:
            if type(leaf) is nn.Linear:
                if layers:
                    activations.append(pending)
                pending = None
                names.append(name)
                layers.append(leaf)
            elif type(leaf) in _DERIVATIVE_FROM_OUTPUT and pending is None:
                pending = leaf
            else:
                return None
        if len({id(layer.weight) for layer in layers}) < len(layers):
            return None
        if not all(p is None or p.requires_grad for layer in layers for p in layer._parameters.values()):
            return None
        return cls(names, layers, activations)

    def tangents(
        self,
        inputs: Mapping[str, Tensor],
        directions: Sequence[Mapping[str, tuple[Tensor, Tensor | None]]],
    ) -> list[Tensor]:
        """``J v`` for each direction v.

        Args:
            inputs: the recorded input of each linear layer, ``[..., in]``.
            directions: per direction, layer name → (dW [out, in], db [out] or None); a missing layer has no tangent.

        Returns:
            per direction a tensor shaped like z.
        """
        flowing: list[Tensor | None] = [None] * len(directions)
        for index, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            a = inputs[name].flatten(0, -2)
            for k, direction in enumerate(directions):
                incoming = flowing[k]
                out = None
                if name in direction:
                    dw, db = direction[name]
                    out = a @ dw.T if db is None else torch.addmm(db, a, dw.T)
                if incoming is not None:
                    weight = layer.weight.detach().T
                    out = incoming @ weight if out is None else out.addmm_(incoming, weight)
                flowing[k] = out
            if index < len(self.activations):
                activation = self.activations[index]
                if activation is not None:
                    following = inputs[self.names[index + 1]].flatten(0, -2)
                    slope = _DERIVATIVE_FROM_OUTPUT[type(activation)](following)
                    flowing = [None if out is None else out.mul_(slope) for out in flowing]
        leading = inputs[self.names[0]].shape[:-1]
        last = self.layers[-1].out_features
        zero = inputs[self.names[0]].new_zeros(*leading, last)
        return [zero if out is None else out.view(*leading, last) for out in flowing]


def _leaves(module: nn.Sequential, prefix: str = "") -> Sequence[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if type(child) is nn.Sequential:
            found.extend(_leaves(child, f"{full}."))
        else:
            found.append((full, child))
    return found


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
