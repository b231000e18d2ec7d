"""From ``p.grad`` of a layer's parameters to the matrix of its block, and back in place."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from natgrad.layers.rules import Block
from natgrad.optim.scaling import Scaling
from natgrad.optim.select import reads_for_free


class Proposal(NamedTuple):
    """What shall replace the gradient of one block."""

    block: Block
    members: Mapping[str, nn.Parameter]
    update: Float[Tensor, "*stack out columns"]
    measure: Tensor


def outside_autocast(method: Callable[..., None]) -> Callable[..., None]:
    """A method that computes in the precision of its tensors, without a graph, wherever it is called."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), torch.autocast(self.view.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call


def gradient_of(block: Block, members: Mapping[str, nn.Parameter]) -> Float[Tensor, "*stack out columns"] | None:
    """The gradient as the matrix of a block, ``[∂h/∂W ∂h/∂b]``; None where no parameter of it has a gradient.

    A block is joint whatever the groups of the optimiser: its weight may be in one, its bias in another.

    Args:
        block: of the layer.
        members: its parameters, ``block.parameters``.
    """
    found = {key: p.grad for key, p in members.items()}
    if all(gradient is None for gradient in found.values()):
        return None
    return block.to_matrix({key: torch.zeros_like(members[key]) if g is None else g for key, g in found.items()})


def replace_gradients(proposals: list[Proposal], scaling: Scaling) -> tuple[Float[Tensor, " layers"], Bool[Tensor, ""]]:
    """Write ``ν U`` into ``p.grad`` of every block, unless something is not finite: then nothing changes.

    Args:
        proposals: of at least one layer; their U's are overwritten.
        scaling: gives ν.

    Returns:
        ν of every layer, and whether everything was finite.
    """
    measures = torch.stack([proposal.measure for proposal in proposals])
    finite = torch.isfinite(measures).all()
    scales = scaling.scales(measures)
    on_cpu = reads_for_free(finite)
    if on_cpu and not finite:  # reading it costs nothing there
        return scales, finite
    torch._foreach_mul_([proposal.update for proposal in proposals], list(scales.unbind()))
    gradients, parts = [], []
    for block, members, update, _ in proposals:
        for key, part in block.from_matrix(update).items():
            gradient = members[key].grad
            if gradient is not None:
                gradients.append(gradient)
                parts.append(part if on_cpu else torch.where(finite, part, gradient.to(part.dtype)))
    torch._foreach_copy_(gradients, parts)
    return scales, finite
