"""Undoing an update by a decision that may live on an accelerator."""

import torch
from jaxtyping import Bool
from torch import Tensor


def keep_where(x: Tensor, condition: Bool[Tensor, ""], otherwise: Tensor | float) -> None:
    """In place: x where the 0-d condition holds, else ``otherwise``.

    On the CPU the condition is simply read: a select over all elements costs as much as several passes over them. On an
    accelerator reading it would wait for the device.
    """
    if condition.device.type == "cpu":
        if not condition:
            x.copy_(otherwise) if isinstance(otherwise, Tensor) else x.fill_(otherwise)
    else:
        x.copy_(torch.where(condition, x, otherwise))
