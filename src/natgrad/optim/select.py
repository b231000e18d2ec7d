"""Decisions that may live on an accelerator, and updates undone by them."""

import torch
from jaxtyping import Bool
from torch import Tensor


def reads_for_free(x: Tensor) -> bool:
    """Whether to read a number does not wait for a device."""
    return x.device.type == "cpu"


def keep_where(x: Tensor, condition: Bool[Tensor, ""], otherwise: Tensor | float) -> None:
    """In place: x where the 0-d condition holds, else ``otherwise``.

    On the CPU the condition is simply read: a select over all elements costs as much as several passes over them. On an
    accelerator reading it would wait for the device.
    """
    if reads_for_free(condition):
        if not condition:
            x.copy_(otherwise) if isinstance(otherwise, Tensor) else x.fill_(otherwise)
    else:
        x.copy_(torch.where(condition, x, otherwise))
