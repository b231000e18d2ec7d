"""Sums over the ranks of the default process group."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return distributed.get_world_size() if _running() else 1


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return distributed.get_rank() if _running() else 0


def agree(number: int, device: torch.device) -> bool:
    """Whether all ranks pass the same number; every rank has to call it."""
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=device)
    distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX)
    highest, lowest = bounds.tolist()
    return highest == -lowest


def summed(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums over the ranks by name: one message for each dtype. Every rank has to call it, with the same shapes.

    Args:
        tensors: what this rank has to add.
        device: of the messages, that of the model.
    """
    found: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        some = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        message = torch.cat([tensor.to(device).reshape(-1) for tensor in some.values()])
        distributed.all_reduce(message)
        parts = message.split([tensor.numel() for tensor in some.values()])
        found |= {name: part.view(some[name].shape) for name, part in zip(some, parts, strict=True)}
    return {name: found[name] for name in tensors}


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
