"""A plain chain of ``nn.Linear`` and elementwise activations, differentiated by hand in both directions.

The layer inputs that a forward pass stores anyway are all that is needed: each activation's derivative is written in
its output, which is the next layer's input. No graph is built, some rows of a batch can be differentiated alone, and
J v costs one pass [KFAC, app. C]. Any other model goes through automatic differentiation, to the same numbers (a test).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from natgrad.layers.capture import Record, foreign_hooks
from natgrad.layers.registry import block_of
from natgrad.layers.rules import Use
from natgrad.model_view import ModelView

# x · dφ/ds in place, written in the output φ(s)
_TIMES_SLOPE: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.Tanh: lambda x, out: torch.ops.aten.tanh_backward.grad_input(x, out, grad_input=x),
    nn.Sigmoid: lambda x, out: torch.ops.aten.sigmoid_backward.grad_input(x, out, grad_input=x),
    nn.ReLU: lambda x, out: torch.ops.aten.threshold_backward.grad_input(x, out, 0.0, grad_input=x),
    nn.Identity: lambda x, out: x,
}

# A backward pass that overwrites the layer inputs takes so many rows at a time: they stay in the cache.
_ROWS_AT_ONCE = 256


class Chain:
    """A model that is exactly Linear (activation Linear)*.

    Args:
        names: clean names of the linear layers, in order.
        layers: those layers.
        activations: the module between layer i and layer i + 1, or None where there is none.
        containers: the modules that hold them, the model first.
    """

    def __init__(
        self,
        names: Sequence[str],
        layers: Sequence[nn.Linear],
        activations: Sequence[nn.Module | None],
        containers: Sequence[nn.Module],
    ) -> None:
        self.names, self.layers, self.activations = tuple(names), tuple(layers), tuple(activations)
        self._modules = (*containers, *layers, *(module for module in activations if module is not None))
        self._leaves = _leaves(containers[0])[0]
        self.blocks = {name: block_of(name, layer) for name, layer in zip(names, layers, strict=True)}

    @classmethod
    def of(cls, view: ModelView) -> "Chain | None":
        """The chain that this model is, or None where it is anything else."""
        model = view.module
        if type(model) is not nn.Sequential or view.forward is not None:
            return None
        leaves, containers = _leaves(model)
        if any("forward" in vars(module) for module in (*containers, *(leaf for _, leaf in leaves))):
            return None  # somebody's own
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
            elif type(leaf) in _TIMES_SLOPE and pending is None:
                pending = leaf
            else:
                return None
        if any(set(layer._parameters) != {"weight", "bias"} for layer in layers):
            return None  # a weight that is computed from others
        members = [p for layer in layers for p in layer._parameters.values() if p is not None]
        if len({id(p) for p in members}) < len(members):
            return None  # a weight or a bias that two layers share
        if not all(p.requires_grad for p in members):
            return None
        return cls(names, layers, activations, containers)

    def fits(self, z: Tensor) -> bool:
        """Whether the passes that z belongs to are the chain's: in the weights' dtype, unchanged by anybody's hooks.

        And whether the model is still the chain: modules may have been exchanged since then.
        """
        if z.dtype != self.layers[0].weight.dtype or _leaves(self._modules[0])[0] != self._leaves:
            return False
        if any(foreign_hooks(module) or "forward" in vars(module) for module in self._modules):
            return False
        return not any(p is not None and p._backward_hooks for layer in self.layers for p in (layer.weight, layer.bias))

    def output_gradients(self, inputs: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        """``g = (∂z/∂s)ᵀ cotangent`` for the output s of every layer.

        Args:
            inputs: the recorded input of each layer, ``[..., in]``.
            cotangent: shaped like z; not changed.
        """
        return {name: g for name, _, g in self.layerwise(dict(inputs), cotangent)}

    def layerwise(
        self, inputs: dict[str, Tensor], cotangent: Tensor, *, consume: bool = False
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The name, the input a and g of every layer, from the last to the first.

        Args:
            inputs: of each layer, by name.
            cotangent: shaped like z; not changed.
            consume: take each input out of ``inputs`` once it is not needed any more, and write the g of the layer
                below to it: a backward pass then needs hardly any memory of its own. The first layer's input, which may
                be the user's, stays as it is.
        """
        g = cotangent.flatten(0, -2)
        for index in reversed(range(len(self.layers))):
            name, layer = self.names[index], self.layers[index]
            yield name, inputs[name], g.view(*inputs[name].shape[:-1], layer.out_features)
            a = inputs.pop(name) if consume else inputs[name]
            if not index:
                return
            weight = layer.weight.detach()
            if consume:
                a = a.flatten(0, -2)
                for some, rows in zip(g.split(_ROWS_AT_ONCE), a.split(_ROWS_AT_ONCE), strict=True):
                    rows.copy_(self.times_slope(index - 1, some @ weight, rows))
                g = a
            else:
                g = self.times_slope(index - 1, g @ weight, a.flatten(0, -2))

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
                following = inputs[self.names[index + 1]].flatten(0, -2)
                flowing = [None if out is None else self.times_slope(index, out, following) for out in flowing]
        leading = inputs[self.names[0]].shape[:-1]
        last = self.layers[-1].out_features
        zero = inputs[self.names[0]].new_zeros(*leading, last)
        return [zero if out is None else out.view(*leading, last) for out in flowing]

    def times_slope(self, index: int, x: Tensor, following: Tensor) -> Tensor:
        """In place: x times the derivative of the activation after layer ``index``.

        Args:
            index: of the layer.
            x: a tangent or cotangent of what came out.
            following: the activation's output, which broadcasts to the shape of x.
        """
        activation = self.activations[index]
        return x if activation is None else _TIMES_SLOPE[type(activation)](x, following)


class ChainRecord(Record):
    """A recorded forward pass of a chain: derivatives come from the layer inputs, there is no graph.

    Args:
        chain: the model.
        inputs: of each layer, by name.
    """

    def __init__(self, chain: Chain, inputs: Mapping[str, Tensor]) -> None:
        super().__init__(chain.blocks)
        self.chain, self.layer_inputs = chain, dict(inputs)
        self.kept: dict[str, Tensor] = {}

    @property
    def inputs(self) -> dict[str, list[Tensor]]:
        """The input of each layer, as its only call."""
        return {name: [a] for name, a in self.layer_inputs.items()}

    @property
    def uses(self) -> dict[str, list[Use]]:
        """The only call of each layer."""
        layers = zip(self.chain.names, self.chain.layers, strict=True)
        return {
            name: [Use(layer, a, torch.Size((*a.shape[:-1], layer.out_features)))]
            for name, layer in layers
            if (a := self.layer_inputs.get(name)) is not None
        }

    @property
    def calls(self) -> dict[str, int]:
        """One for each layer."""
        return dict.fromkeys(self.layers, 1)

    def source(self, z: Tensor) -> str | None:
        """The last layer: its output is z."""
        return self.chain.names[-1]

    def chain_order(self, z: Tensor) -> tuple[str, ...]:
        """The layers in forward order."""
        return self.chain.names

    def layerwise(
        self, cotangent: Tensor, *, consume: bool = False, keep: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The name, the input a and g of every layer, from the last to the first.

        Args:
            cotangent: shaped like z.
            consume: give the inputs up on the way (:meth:`Chain.layerwise`); nothing else can be asked of this record
                then.
            keep: examples whose inputs are copied to ``kept`` before.
        """
        for name, a, g in self.chain.layerwise(self.layer_inputs, cotangent, consume=consume):
            if keep is not None:
                self.kept[name] = a[keep]
            yield name, a, g

    def gradients(
        self,
        z: Tensor,
        cotangent: Tensor,
        parameters: Iterable[Tensor] = (),
        retain_graph: bool = True,
        *,
        batched: bool = False,
    ) -> tuple[dict[str, list[Tensor]], list[Tensor | None]]:
        """As for any record; a chain has no parameters outside of its layers."""
        if batched:
            single = [self.chain.output_gradients(self.layer_inputs, c) for c in cotangent]
            found = {name: torch.stack([g[name] for g in single]) for name in self.layers}
        else:
            found = self.chain.output_gradients(self.layer_inputs, cotangent)
        return {name: [g] for name, g in found.items()}, [None for _ in parameters]


def _leaves(module: nn.Module, prefix: str = "") -> tuple[list[tuple[str, nn.Module]], list[nn.Module]]:
    """What a nest of sequences calls, in order and as often as it does; and the sequences."""
    found: list[tuple[str, nn.Module]] = []
    containers: list[nn.Module] = [module]
    for name, child in module._modules.items():  # children() would leave out the second use of a module
        if type(child) is nn.Sequential:
            leaves, inner = _leaves(child, f"{prefix}{name}.")
            found.extend(leaves)
            containers.extend(inner)
        elif child is not None:
            found.append((f"{prefix}{name}", child))
    return found, containers
