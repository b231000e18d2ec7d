"""A layer's factors and inverse in a checkpoint, and how a state is compared with what shall load it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, entries, to_dense
from natgrad.layers.rules import Block
from natgrad.optim.inverses import LayerInverses


def leaders(blocks: Mapping[str, Block]) -> dict[str, str]:
    """The first trainable parameter of every covered layer, which its factors are saved with → the layer."""
    return {next(iter(block.members.values())): name for name, block in blocks.items()}


def save_layer(block: Block, factors: Factors | None, inverses: LayerInverses) -> dict[str, Tensor]:
    """Factors and inverse of one layer as matrices and flags; what is diagonal by definition as vectors.

    The shapes depend on the layer alone, not on what was observed so far: a new object's state can be the template that
    ``torch.distributed.checkpoint.load`` fills. Tensors in use are not copied.
    """
    like = torch.zeros((), dtype=block.dtype, device=next(iter(block.parameters.values())).device)
    state = {}
    found = (None, None) if factors is None else (factors.A, factors.G)
    for key, factor, shape in zip("AG", found, block.factor_shapes, strict=True):
        factor = like.new_zeros(shape) if factor is None else factor
        state[key] = entries(factor) if len(shape) == 1 else to_dense(factor)
        state[f"{key}_diagonal"] = torch.tensor(isinstance(factor, Diagonal))
    return state | inverses.state(block.name, block.factor_shapes, like)


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
            "optimiser with other settings, such as form= of damping, structure= or momentum="
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
    found = layer[key]
    if found.ndim == 1:
        return Diagonal(found.clone())
    return Diagonal(found.diagonal().clone()) if bool(layer[f"{key}_diagonal"]) else found.clone()
