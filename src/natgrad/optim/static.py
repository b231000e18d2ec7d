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

    Raises:
        ValueError: no examples, or NaN or infinite values among them.
    """

    def __init__(self, inputs: Any) -> None:
        batch_size(inputs)
        if not all(torch.isfinite(leaf).all() for leaf in tensor_leaves(inputs)):
            raise ValueError(
                "static_inputs: NaN or infinite values; expected finite inputs (leave out the rows with them)"
            )
        self.inputs = inputs
        self._factors: dict[str, Tensor] | None = None

    @property
    def layers(self) -> frozenset[str]:
        """The layers whose factor A is known; none before the first call of :meth:`factors`."""
        return frozenset(self._factors or ())

    def factors(self, record: Record, inputs: Any) -> dict[str, Float[Tensor, "columns columns"]]:
        """A by layer name; found at the first call.

        Args:
            record: of a forward pass.
            inputs: of that forward pass.

        Raises:
            ValueError: no layer sees the inputs as they are, or the examples of the batch have another shape.
        """
        if self._factors is None:
            fed = _fed_by(record, inputs)
            if not fed:
                raise ValueError(
                    "static_inputs: no covered layer takes the inputs of the model as they are (changed on the way, "
                    "or by forward=); leave static_inputs out"
                )
            leaves = self._leaves_like(tensor_leaves(inputs))
            self._factors = {
                name: _mean_moment(record.layers[name], leaves[leaf].reshape(-1, columns), len(leaves[leaf]))
                for name, (leaf, columns) in fed.items()
            }
        return self._factors

    def _leaves_like(self, batch: list[Tensor]) -> list[Tensor]:
        leaves = tensor_leaves(self.inputs)
        here, there = ([tuple(leaf.shape[1:]) for leaf in found] for found in (leaves, batch))
        if here != there:
            raise ValueError(
                f"static_inputs: an example has the shapes {here}, in this batch {there}; expected all training "
                "inputs in the form of a batch"
            )
        return leaves


def _fed_by(record: Record, inputs: Any) -> dict[str, tuple[int, int]]:
    """Layers whose only input is a tensor of the batch, or a view of its rows: which one, and the length of a row."""
    leaves = tensor_leaves(inputs)
    found: dict[str, tuple[int, int]] = {}
    for name, calls in record.inputs.items():
        block = record.blocks[name]
        if not block.rule.by_hand or block.sharing != "expand":
            continue
        for index, leaf in enumerate(leaves):
            a = calls[0]
            whole = len(calls) == 1 and a.numel() == leaf.numel() and a.data_ptr() == leaf.data_ptr()
            if whole and _same_rows(a, leaf):
                found[name] = index, a.shape[-1]
    return found


def _same_rows(view: Tensor, leaf: Tensor) -> bool:
    """Whether the view's rows are the leaf's numbers in order, cut into equal lengths; a transposed view's are not."""
    itself = view.shape == leaf.shape and view.stride() == leaf.stride()
    return itself or (leaf.is_contiguous() and (view.stride(-1) == 1 or view.shape[-1] == 1))


def _mean_moment(layer: nn.Linear, rows: Tensor, examples: int) -> Tensor:
    weight, bias = trainable_parts(layer)
    like = layer.weight
    total = like.new_zeros((), dtype=torch.float64)
    for a in rows.split(_ROWS_AT_ONCE):
        total = total + input_moment(a.to(like.device, like.dtype), weight, bias).double()
    return (total / examples).to(like.dtype)
