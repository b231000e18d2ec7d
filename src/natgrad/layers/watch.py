"""Records the forward passes that a user's own loop makes, so that statistics can reuse them.

Hooks on the model say when a forward pass begins and ends; those on the layers (:mod:`natgrad.layers.capture`) record
in between. What no one asks for is dropped: a pass holds on to the activations of the covered layers.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.layers.bare import BareRule
from natgrad.layers.capture import Capture, Record
from natgrad.layers.graph import graph_of

# Forward passes kept in training mode until someone asks for them: losses of several passes stay possible.
_KEPT = 8


class Watch:
    """Records every forward pass of a model that builds a graph, while it is :attr:`active`.

    Args:
        model: its ``__call__`` begins and ends a pass; unwrapped.
        capture: of the layers.

    Attributes:
        active: whether passes are recorded; setting it to False drops those that were.
    """

    def __init__(self, model: nn.Module, capture: Capture) -> None:
        self._capture = capture
        self._passes: list[Record] = []
        self._active = True
        self._depth = 0
        handles = [
            model.register_forward_pre_hook(_Begin(self, model)),
            # Also after an exception: the pass must end.
            model.register_forward_hook(_End(self, model), always_call=True),
        ]
        self._finalizer = weakref.finalize(self, _remove, handles)

    @property
    def active(self) -> bool:
        """Whether forward passes are recorded."""
        return self._active

    @active.setter
    def active(self, value: bool) -> None:
        self._active = value
        if not value:
            self.clear()

    def clear(self) -> None:
        """Drop what was recorded."""
        self.settle()
        self._passes.clear()

    def settle(self) -> None:
        """End a pass that was interrupted from the keyboard, of which no hook is told."""
        if self._depth:
            self._depth = 0
            self._capture.stop()
            self._passes.pop()

    def take(self, z: Tensor) -> Record:
        """The calls that z was computed by, and no others; they are handed out once.

        Raises:
            ValueError: z has no graph, or a layer was applied to what was computed from it.
            RuntimeError: no recorded pass contributed to z, or a layer ran inside reentrant checkpointing.
        """
        if not z.requires_grad:
            raise ValueError(
                "z has no graph: it was detached, or computed under torch.no_grad(); pass the model's output"
            )
        taken = Record(self._capture.blocks, self._capture.positions)
        for record in self._passes:
            found = record.take(z)
            if any(found.calls.values()):
                _refuse_intermediate(z, record)
            taken.extend(found)
        taken.refuse_hidden(z)
        self._passes = [record for record in self._passes if any(record.calls.values())]
        # Of parameters without a layer nothing is recorded: their gradients are all that is asked for.
        if not any(taken.calls.values()) and any(not isinstance(b.rule, BareRule) for b in taken.blocks.values()):
            raise RuntimeError(
                "z does not come from a forward pass that was recorded since the last step. Call observe(z) once, with "
                "the output of model(x) and before the optimiser's step; for a compiled model, or one whose layers are "
                "not called by the model itself, call update(x) instead"
            )
        return taken

    def remove(self) -> None:
        """Take the hooks off the model; happens by itself when the watch is garbage."""
        self._finalizer()

    def _begin(self, training: bool) -> None:
        if self._depth == 0:
            if not self._active or self._capture.recording or not torch.is_grad_enabled() or _transformed():
                return
            keep = _KEPT - 1 if training else 0
            del self._passes[: max(0, len(self._passes) - keep)]
            self._passes.append(self._capture.start())
        self._depth += 1

    def _end(self, completed: bool) -> None:
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            self._capture.stop()
            if not completed:
                self._passes.pop()


class _Hook:
    """Holds its watch weakly; copies are inert."""

    def __init__(self, watch: Watch | None, module: nn.Module | None = None) -> None:
        self._watch = weakref.ref(watch) if watch is not None else None
        self._module = weakref.ref(module) if module is not None else None

    def watch(self, module: nn.Module) -> Watch | None:
        """The watch, where it wants to hear of this call."""
        if self._watch is None or self._module is None or self._module() is not module:
            return None
        # A backward pass that recomputes (activation checkpointing) is no forward pass.
        return self._watch() if torch._C._current_graph_task_id() == -1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return type(self)(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


class _Begin(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        watch = self.watch(module)
        if watch is not None:
            watch._begin(module.training)


class _End(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        watch = self.watch(module)
        if watch is not None:
            watch._end(completed=output is not None)


def _refuse_intermediate(z: Tensor, rest: Record) -> None:
    """Refuse a z in the middle of a model, behind which layers would have no curvature.

    Args:
        z: what was given as the model's output.
        rest: the calls of the same pass that z does not depend on.
    """
    for name, edges in rest.edges.items():
        if any(edge is not None and z.grad_fn in graph_of(edge.node) for edge in edges):
            raise ValueError(
                f"z is not the output of the model: layer {name!r} was applied to what was computed from it; pass what "
                "the loss is computed from"
            )


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work; its tensors have no graph to record."""
    return torch._C._are_functorch_transforms_active()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
