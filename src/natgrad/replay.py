"""Random numbers and buffers replayed: one step, one function, however often the model is evaluated within it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Replay:
    """A state of the random number generators and the buffers that can be entered again and again.

    Inside ``with replay:`` dropout draws the same masks and the buffers have the same values, each time anew. On
    leaving, generators and buffers are as they were before the block: nothing that happens inside is seen outside.

    Args:
        module: the model; its buffers and the generators of the CPU and of its devices are captured now.
    """

    def __init__(self, module: nn.Module) -> None:
        self._devices = _accelerators(module)
        self._rng = _rng_states(self._devices)
        copies: dict[int, Tensor] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        for owner, name, buffer in _buffers(module):
            copy = copies.setdefault(id(buffer), buffer.detach().clone())
            self._buffers.append((owner, name, copy))
        self._outside: list[tuple[list[Any], list[tuple[nn.Module, str, Tensor | None]]]] = []

    def drawn(self) -> bool:
        """Whether random numbers have been drawn since the state was captured."""
        now = _rng_states(self._devices)
        return not all(torch.equal(old, new) for old, new in zip(self._rng, now, strict=True))

    def __enter__(self) -> "Replay":
        """Enter the captured state."""
        # The buffers themselves are swapped, not overwritten: graphs that saved the outer ones stay valid.
        outer = [(owner, name, owner._buffers[name]) for owner, name, _ in self._buffers]
        self._outside.append((_rng_states(self._devices), outer))
        copies: dict[int, Tensor] = {}
        for owner, name, saved in self._buffers:
            owner._buffers[name] = copies.setdefault(id(saved), saved.clone())
        _set_rng_states(self._devices, self._rng)
        return self

    def __exit__(self, *exception: object) -> None:
        """Return to the state from before the block."""
        states, buffers = self._outside.pop()
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        _set_rng_states(self._devices, states)


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield owner, name, buffer


def _accelerators(module: nn.Module) -> list[torch.device]:
    tensors = [*module.parameters(), *module.buffers()]
    devices = {t.device for t in tensors if t.device.type != "cpu"}
    return sorted((d for d in devices if hasattr(getattr(torch, d.type, None), "get_rng_state")), key=str)


def _rng_states(devices: list[torch.device]) -> list[Any]:
    states: list[Any] = [torch.get_rng_state()]
    for device in devices:
        backend = getattr(torch, device.type)
        states.append(backend.get_rng_state() if device.type == "mps" else backend.get_rng_state(device))
    return states


def _set_rng_states(devices: list[torch.device], states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        backend = getattr(torch, device.type)
        backend.set_rng_state(state) if device.type == "mps" else backend.set_rng_state(state, device)
