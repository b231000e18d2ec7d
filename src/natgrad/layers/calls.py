"""One recorded call of a layer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class Call(NamedTuple):
    """What went into a layer, and where in the graph what came out is."""

    input: Tensor  # detached; shares its version counter with the tensor that the layer received
    version: int | None
    edge: GradientEdge | None  # None where the output does not require a gradient
    output: tuple[torch.Size, torch.dtype, torch.device]
    layer: Any = None
    training: bool = True
    slot: slice | None = None
    arrange: Callable[[Tensor], Tensor] | None = None


def unchanged(name: str, call: Call) -> Tensor:
    """The input of a call.

    Raises:
        RuntimeError: it was changed in place after the layer had used it.
    """
    if call.version is not None and call.input._version != call.version:
        raise RuntimeError(
            f"the input of layer {name!r} was changed in place after the layer had used it, so its statistics would "
            "be wrong; change a copy instead (x = x + 1 in place of x += 1, inplace=False)"
        )
    return call.input


def or_zeros(g: Tensor | None, call: Call, batch: Sequence[int]) -> Tensor:
    """The derivatives of a call's output; zeros where there are none."""
    shape, dtype, device = call.output
    if g is not None:
        return g.reshape(*batch, *shape)  # that of what the output is a view of, see edge_of
    return torch.zeros((*batch, *shape), dtype=dtype, device=device)
