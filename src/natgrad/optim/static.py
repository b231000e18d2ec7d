"""Inputs that are the same at every update: a first layer's factor A, computed once and exactly."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.kfac import trainable_parts
from natgrad.layers.capture import Record
from natgrad.layers.factors import input_moment
from natgrad.model_view import batch_size, tensor_leaves

_ROWS_AT_ONCE = 4096


class StaticInputs:
    """The factor ``A = 1/N Σ a aᵀ`` of every layer that is fed by raw data, over all N inputs of a training set.

    A does not depend on the parameters there: the decayed average of sampled estimates only adds noise to it.

    Args:
        inputs: all training inputs, in the form of a batch.
    """

    def __init__(self, inputs: Any) -> None:
        batch_size(inputs)
        self.inputs = inputs
        self._factors: dict[str, Tensor] | None = None

    def factors(self, record: Record, inputs: Any) -> dict[str, Float[Tensor, "columns columns"]]:
        """A by layer name; found at the first call.

        Args:
            record: of a forward pass.
            inputs: of that forward pass.

        Raises:
            ValueError: no layer sees the inputs as they are.
        """
        if self._factors is None:
            fed = _fed_by(record, inputs)
            if not fed:
                raise ValueError(
                    "static_inputs: no covered layer takes the model's inputs as they are (they are changed on the "
                    "way, or by forward=); leave static_inputs out"
                )
            leaves = tensor_leaves(self.inputs)
            self._factors = {
                name: _mean_moment(record.layers[name], leaves[leaf].reshape(-1, *shape))
                for name, (leaf, shape) in fed.items()
            }
        return self._factors


def _fed_by(record: Record, inputs: Any) -> dict[str, tuple[int, torch.Size]]:
    """Layers whose only input is a tensor of the batch or a view of all of it: which one, and an example's shape."""
    leaves = tensor_leaves(inputs)
    found: dict[str, tuple[int, torch.Size]] = {}
    for name, calls in record.inputs.items():
        for index, leaf in enumerate(leaves):
            a = calls[0]
            if len(calls) == 1 and a.numel() == leaf.numel() and a.data_ptr() == leaf.data_ptr():
                found[name] = index, a.shape[1:]
    return found


def _mean_moment(layer: nn.Linear, leaf: Tensor) -> Tensor:
    weight, bias = trainable_parts(layer)
    like = layer.weight
    total = like.new_zeros((), dtype=torch.float64)
    for a in leaf.split(_ROWS_AT_ONCE):
        total = total + input_moment(a.to(like.device, like.dtype), weight, bias).double()
    return (total / leaf.shape[0]).to(like.dtype)
