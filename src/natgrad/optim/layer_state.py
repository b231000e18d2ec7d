"""A layer's factors and inverse in a checkpoint, and how a state is compared with what shall load it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature.base import Diagonal, Factors, to_dense
from natgrad.curvature.kfac import trainable_parts
from natgrad.optim.inverses import LayerInverses


def save_layer(name: str, layer: nn.Linear, factors: Factors | None, inverses: LayerInverses) -> dict[str, Tensor]:
    """Factors and inverse of one layer as dense matrices and flags.

    The shapes depend on the layer alone, not on what was observed so far: a new object's state can be the template that
    ``torch.distributed.checkpoint.load`` fills. Tensors in use are not copied.
    """
    weight, bias = trainable_parts(layer)
    out, columns = layer.out_features, layer.in_features * weight + bias
    like = torch.zeros((), dtype=torch.promote_types(layer.weight.dtype, torch.float32), device=layer.weight.device)
    if factors is None:
        factors = Factors(like.new_zeros(columns, columns), like.new_zeros(out, out))
    state = {}
    for key, factor in (("A", factors.A), ("G", factors.G)):
        state[key], state[f"{key}_diagonal"] = to_dense(factor), torch.tensor(isinstance(factor, Diagonal))
    return state | inverses.state(name, columns, out, like)


def load_factors(state: Mapping[str, Tensor]) -> Factors:
    """The factors of a :func:`save_layer`, as tensors of their own."""
    return Factors(_factor(state, "A"), _factor(state, "G"))


def warn_of_threads(saved: int) -> None:
    """Say that another number of threads than the saved one will not give the same bits."""
    if saved != torch.get_num_threads():
        warnings.warn(
            f"the state was saved with {saved} threads and is loaded with {torch.get_num_threads()}: "
            "factorisations differ in the last digits",
            stacklevel=4,
        )


def same_keys(what: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Compare the keys of a state with those of the object that shall load it.

    Raises:
        ValueError: some are missing or unknown.
    """
    missing, unknown = [k for k in own if k not in other], [k for k in other if k not in own]
    if missing or unknown:
        parts = [f"lacks {missing}" if missing else "", f"has unknown {unknown}" if unknown else ""]
        raise ValueError(
            f"{what}: the state {' and '.join(part for part in parts if part)}; it is that of another model, or of an "
            "optimiser with another form= of damping or structure="
        )


def same_shape(what: str, own: Tensor, other: Any) -> None:
    """Compare a saved tensor with the one that it would replace.

    Raises:
        ValueError: it is no tensor, or of another shape or kind of numbers.
    """
    if not isinstance(other, Tensor) or other.shape != own.shape:
        got = f"shape {tuple(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
        raise ValueError(f"{what}: expected a tensor of shape {tuple(own.shape)}, got {got}")
    if other.dtype.is_floating_point != own.dtype.is_floating_point:
        raise ValueError(f"{what}: expected a tensor like {own.dtype}, got {other.dtype}")


def _factor(layer: Mapping[str, Tensor], key: str) -> Tensor | Diagonal:
    matrix = layer[key]
    return Diagonal(matrix.diagonal().clone()) if bool(layer[f"{key}_diagonal"]) else matrix.clone()
