"""A step of somebody else's optimiser that is undone, without waiting for the device, where its gradient was no good.

On an accelerator to read whether a gradient is finite means to wait until all work so far is done. So the step is made
in any case and then selected: what a parameter or a state was, or what it has become.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from natgrad.optim.select import reads_for_free


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> Bool[Tensor, ""]:
    """Whether every entry is, as a tensor on the device.

    Args:
        tensors: possibly on several devices, possibly sparse.
        device: of the result.
    """
    dense = [t.to_dense() if t.is_sparse else t for t in tensors]
    if not dense:
        return torch.ones((), dtype=torch.bool, device=device)
    norms = torch._foreach_norm(dense, float("inf"))
    return torch.isfinite(torch.stack([norm.to(device, non_blocking=True).float() for norm in norms])).all()


def step_where(
    usable: Bool[Tensor, ""], optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None
) -> Any:
    """``optimizer.step(closure)``, which leaves parameters and state as they were where ``usable`` is False.

    A fused optimiser does that itself; of others the parameters and their state are copied. State that a step creates
    starts at zero. What the optimiser keeps in the host's memory (Adam's number of steps, unless ``capturable``) counts
    the step.

    Args:
        usable: on the device of the parameters, or on one of them.
        optimizer: any; its state holds tensors or numbers.
        closure: as ``step`` takes it.

    Returns:
        what ``step`` returned.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # The names by which a GradScaler tells a fused optimiser to leave out a step.
        fused: Any = optimizer
        fused.found_inf, fused.grad_scale = (~usable).float(), None
        try:
            return optimizer.step(closure)
        finally:
            del fused.found_inf, fused.grad_scale
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = {id(t): t.detach().clone() for t in (*parameters, *_state(optimizer))}
    result = optimizer.step(closure)
    with torch.no_grad():
        flags: dict[torch.device, Tensor] = {}
        for t in (*parameters, *_state(optimizer)):
            if reads_for_free(t) and not reads_for_free(usable):
                continue
            if t.device not in flags:
                flags[t.device] = usable.to(t.device, non_blocking=True)
            old = before.get(id(t))
            t.copy_(torch.where(flags[t.device], t, torch.zeros_like(t) if old is None else old))
    return result


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
