"""The forward hooks that a capture puts on layers. They hold it weakly, and copies of them are inert."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LayerHook:
    """The forward hook of one layer. Copies are inert: they belong to no capture."""

    def __init__(self, capture: Any, name: str = "", layer: nn.Module | None = None) -> None:
        self._capture = weakref.ref(capture) if capture is not None else None
        self._layer = weakref.ref(layer) if layer is not None else None
        self._name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Record the call."""
        capture = self._recording(module)
        if capture is not None:
            assert capture._record is not None  # for the type checker
            a = args[0] if args else next(iter(kwargs.values()))
            capture._record._add(self._name, a, output, module)

    def _recording(self, module: nn.Module) -> Any:
        """The capture, where it records this call."""
        if torch.compiler.is_compiling() or self._capture is None:
            return None
        capture = self._capture()
        if capture is None or capture._record is None or self._layer is None or self._layer() is not module:
            return None
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing recomputes the forward pass
            return None
        return capture

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerHook":
        return type(self)(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


class EnterCall(LayerHook):
    """Before a call of a layer that hides its linear maps (attention, cells): they are recorded until the call ends.

    Inside activation checkpointing the maps are computed one by one in any case, in the forward pass and when it is
    computed again: what the one keeps for its backward pass has to be what the other finds.

    Args:
        capture: that records.
        layer: the module.
        names: of its blocks by the names of the maps, such as ``"in_proj"`` and ``"out_proj"``.
        running: shared with the hook that ends the call.
        interceptor: sees the maps of a layer of this kind.
    """

    def __init__(
        self, capture: Any, layer: Any = None, names: Any = None, running: Any = None, interceptor: Any = None
    ) -> None:
        super().__init__(capture, "", layer)
        self._names, self._running, self._interceptor = names, running, interceptor

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:  # pyrefly: ignore[bad-override]
        """Begin."""
        capture = self._recording(module)
        if capture is None and not self._kept_by_hooks(module):
            return
        record, names = None if capture is None else capture._record, self._names

        def seen(which: str, a: Tensor, output: Tensor, slot: slice | None, arrange: Any) -> None:
            if record is not None and which in names:
                record._add(names[which], a, output, module, slot, arrange)

        for running in torch.overrides._get_current_function_mode_stack():
            if type(running) is self._interceptor and running.layer is module:  # another capture's: both are told
                running.seen = _both(running.seen, seen)
                self._running.append(None)
                return
        mode = self._interceptor(module, seen)
        mode.__enter__()
        self._running.append(mode)

    def _kept_by_hooks(self, module: nn.Module) -> bool:
        """Whether this call's tensors are saved by somebody's hooks, as those of activation checkpointing."""
        if torch.compiler.is_compiling() or self._capture is None or self._capture() is None or self._layer is None:
            return False
        return self._layer() is module and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class LeaveCall(LayerHook):
    """After such a call, also one that failed.

    Args:
        capture: that records.
        layer: the module.
        running: of the hook that began the call.
    """

    def __init__(self, capture: Any, layer: Any = None, running: Any = None) -> None:
        super().__init__(capture, "", layer)
        self._running = running

    def __call__(self, module: Any, args: Any, output: Any) -> None:  # pyrefly: ignore[bad-override]
        """End."""
        mode = self._running.pop() if self._running else None
        if mode is not None:
            mode.__exit__(None, None, None)


def around_call(
    capture: Any, layer: nn.Module, names: Mapping[str, str], interceptor: Any
) -> tuple[EnterCall, LeaveCall]:
    """The pair of hooks that records one layer from the inside."""
    running: list[Any] = []
    return EnterCall(capture, layer, names, running, interceptor), LeaveCall(capture, layer, running)


def _both(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    def seen(*call: Any) -> None:
        first(*call)
        second(*call)

    return seen


def foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody else's hooks may change what goes into a module, comes out of it or flows back."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not isinstance(hook, LayerHook) for hook in module._forward_hooks.values())
