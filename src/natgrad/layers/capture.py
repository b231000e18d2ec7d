"""Hooks that record what enters layers, and where in the graph their outputs are.

Nothing else in the library touches hooks. A :class:`Capture` puts one permanent forward hook on every layer. The
hooks do nothing until :meth:`Capture.record` is entered, so that they may be there before a model is compiled
(compiled code skips them; run recorded passes under the stance ``"force_eager"``). They hold the capture weakly, and
a deep or pickled copy of a hooked model has inert hooks.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.layers.calls import Call, or_zeros, unchanged
from natgrad.layers.graph import edge_of, graph_of, uses_reentrant_checkpoint
from natgrad.layers.hooks import LayerHook, around_call, foreign_hooks
from natgrad.layers.order import chain_of
from natgrad.layers.registry import blocks_of
from natgrad.layers.rules import Block, Use

__all__ = ["Capture", "Record", "foreign_hooks"]


class Record:
    """What one recorded forward pass left behind.

    Args:
        layers: the recorded layers, or blocks of them, by clean name.
        positions: of every use, ``every`` and ``phase``.
    """

    def __init__(self, layers: Mapping[str, nn.Module | Block], positions: tuple[int, int] = (1, 0)) -> None:
        self.blocks, self.positions = blocks_of(layers), positions
        self._calls: dict[str, list[Call]] = {name: [] for name in layers}
        self._untracked: set[str] = set()
        self._taken: dict[Any, str] = {}

    @property
    def layers(self) -> dict[str, Any]:
        """The recorded layers by the names of their blocks."""
        return {name: block.layer for name, block in self.blocks.items()}

    @property
    def uses(self) -> dict[str, list[Use]]:
        """The calls of each layer, in order, with what a rule needs to know of them; as :attr:`inputs` otherwise.

        Raises:
            RuntimeError: as :attr:`inputs`.
        """
        thin = self.positions
        return {
            name: [
                Use(
                    call.layer,
                    unchanged(name, call),
                    call.output[0],
                    call.training,
                    call.slot,
                    call.arrange,
                    1.0,
                    *thin,
                )
                for call in calls
            ]
            for name, calls in self._calls.items()
            if calls
        }

    @property
    def inputs(self) -> dict[str, list[Tensor]]:
        """The inputs of each layer, one per call, detached, as given to the layer; no entry for a layer never called.

        Raises:
            RuntimeError: an input was changed in place after the layer had used it.
        """
        return {name: [unchanged(name, call) for call in calls] for name, calls in self._calls.items() if calls}

    @property
    def calls(self) -> dict[str, int]:
        """How often each layer was called."""
        return {name: len(calls) for name, calls in self._calls.items()}

    @property
    def edges(self) -> dict[str, list[GradientEdge | None]]:
        """Where in the graph the outputs of each layer's calls are; None for one that requires no gradient."""
        return {name: [call.edge for call in calls] for name, calls in self._calls.items()}

    def shape_of(self, name: str, call: int) -> torch.Size:
        """The shape of the output of one call."""
        return self._calls[name][call].output[0]

    def source(self, z: Tensor) -> str | None:
        """The name of the layer whose only call returned exactly z, or None."""
        if not z.requires_grad or z.grad_fn is None:
            return None
        edge = edge_of(z)
        for name, calls in self._calls.items():
            if len(calls) == 1 and calls[0].edge == edge and calls[0].output[0] == z.shape:
                return name
        return None

    def chain_order(self, z: Tensor) -> tuple[str, ...]:
        """The layers in forward order, where each takes the output of the one before it.

        Raises:
            ValueError: they do not form a chain; says where.
        """
        self.refuse_hidden(z)
        nodes = {n: [None if call.edge is None else call.edge.node for call in c] for n, c in self._calls.items()}
        return chain_of(nodes, z)

    def output_gradients(
        self, z: Tensor, cotangent: Tensor, retain_graph: bool = True, *, batched: bool = False
    ) -> dict[str, list[Tensor]]:
        r"""``g = (∂z/∂s)ᵀ cotangent`` for the output s of every call, by one backward pass without weight gradients.

        Args:
            z: the output of the recorded forward pass.
            cotangent: shaped like z; with ``batched``, ``[k, *z.shape]`` for k backward passes at once.
            retain_graph: keep the graph for further passes.
            batched: see ``cotangent``; every g then is ``[k, *s.shape]``.

        Returns:
            lists parallel to those of :attr:`inputs`; zeros where z does not depend on an output.

        Raises:
            RuntimeError: a layer ran inside reentrant activation checkpointing, which hides its output from the graph.
        """
        return self.gradients(z, cotangent, retain_graph=retain_graph, batched=batched)[0]

    def gradients(
        self,
        z: Tensor,
        cotangent: Tensor,
        parameters: Iterable[Tensor] = (),
        retain_graph: bool = True,
        *,
        batched: bool = False,
    ) -> tuple[dict[str, list[Tensor]], list[Tensor | None]]:
        """As :meth:`output_gradients`, and in the same pass the gradients of parameters (None where z has none)."""
        self.refuse_hidden(z)
        parameters = list(parameters)
        edges = [call.edge for calls in self._calls.values() for call in calls if call.edge is not None]
        wanted: Sequence[Any] = [*edges, *parameters]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and z.requires_grad:
            found = torch.autograd.grad(
                z, wanted, cotangent, retain_graph=retain_graph, allow_unused=True, is_grads_batched=batched
            )
        batch = cotangent.shape[:1] if batched else ()
        remaining = iter(found)
        gradients: dict[str, list[Tensor]] = {}
        for name, calls in self._calls.items():
            if calls:
                gradients[name] = [
                    or_zeros(next(remaining) if call.edge is not None else None, call, batch) for call in calls
                ]
        return gradients, list(remaining)

    def refuse_hidden(self, z: Tensor) -> None:
        """Refuse layers whose output does not appear in the graph of z although z depends on it.

        Raises:
            RuntimeError: a layer ran inside reentrant activation checkpointing; it is named.
        """
        if self._untracked and uses_reentrant_checkpoint(z):
            raise RuntimeError(
                f"{', '.join(sorted(self._untracked))}: called inside torch.utils.checkpoint with use_reentrant=True, "
                "which hides the layer's output from the graph; pass use_reentrant=False to checkpoint()"
            )

    def used_elsewhere(self, z: Tensor) -> dict[str, str]:
        """Blocks whose parameters the graph of z uses more often than their layers were called: (block, parameter)."""
        if z.grad_fn is None:
            return {}
        leaves = {
            get_gradient_edge(p).node: (name, key)
            for name, block in self.blocks.items()
            if self._calls[name]
            for key, p in block.parameters.items()
        }
        counts = Counter(
            leaves[parent] for node in graph_of(z.grad_fn) for parent, _ in node.next_functions if parent in leaves
        )
        return {name: key for (name, key), uses in counts.items() if uses > len(self._calls[name])}

    def take(self, z: Tensor) -> "Record":
        """The calls that z depends on, as a record of their own; they leave this one.

        Raises:
            ValueError: another output took some of them already, so that they would be missing here.
        """
        taken, graph = Record(self.blocks, self.positions), graph_of(z.grad_fn)
        again = [name for node, name in self._taken.items() if node in graph]
        if again:
            raise ValueError(
                f"z: layer {again[0]!r} was observed already, with another output of the same forward pass; observe "
                "one of them, or all at once as one tensor (torch.stack([z1, z2], dim=1)) with a likelihood for it"
            )
        for name, calls in self._calls.items():
            taken._calls[name] = [call for call in calls if call.edge is not None and call.edge.node in graph]
            self._calls[name] = [call for call in calls if call.edge is None or call.edge.node not in graph]
            self._taken |= {call.edge.node: name for call in taken._calls[name] if call.edge is not None}
        taken._untracked |= self._untracked
        return taken

    def extend(self, other: "Record") -> None:
        """Add the calls of another record of the same layers, in order."""
        for name, calls in other._calls.items():
            self._calls[name].extend(calls)
        self._untracked |= other._untracked

    def _add(
        self,
        name: str,
        a: Tensor,
        output: Tensor,
        layer: Any = None,
        slot: slice | None = None,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {name!r} returned {type(output).__name__}; a layer with a rule takes one tensor and returns one"
            )
        edge = edge_of(output) if output.requires_grad else None
        if edge is None:
            self._untracked.add(name)
        version = None if a.is_inference() else a._version
        kept = output.shape, output.dtype, output.device
        training = True if layer is None else layer.training
        self._calls[name].append(Call(a.detach(), version, edge, kept, layer, training, slot, arrange))

    def _clear(self) -> None:
        for calls in self._calls.values():
            calls.clear()
        self._untracked.clear()


class Capture:
    """Permanent hooks on some layers of a model, silent until asked.

    Args:
        model: the model that owns the layers (kept by nobody: the hooks live on the layers).
        layers: the layers to record, or blocks of them, by clean name; each takes one tensor and returns one.

    Attributes:
        positions: ``every`` and ``phase`` of the uses in coming records: which positions sums over inputs are made of.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module | Block]) -> None:
        del model
        self.blocks = blocks_of(layers)
        self.positions = (1, 0)
        self._record: Record | None = None
        handles: list[Any] = []
        inside: dict[int, tuple[nn.Module, dict[str, str], Any]] = {}
        for name, block in self.blocks.items():
            for layer in block.modules if block.rule.captured else ():
                # In front of hooks that change what the layer returns: G is that of what it computed.
                hook = LayerHook(self, name, layer)
                handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
            if block.rule.interceptor is not None:
                names = inside.setdefault(id(block.layer), (block.layer, {}, block.rule.interceptor))[1]
                names[name.rpartition(".")[2]] = name
        for layer, names, interceptor in inside.values():
            before, after = around_call(self, layer, names, interceptor)
            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(after, always_call=True))
        self._finalizer = weakref.finalize(self, _remove, handles)

    @property
    def layers(self) -> dict[str, Any]:
        """The recorded layers by the names of their blocks."""
        return {name: block.layer for name, block in self.blocks.items()}

    @contextmanager
    def record(self) -> Iterator[Record]:
        """Record the forward calls made inside the block.

        An exception inside the block leaves nothing recorded and nothing active.

        Raises:
            RuntimeError: this capture is recording already.
        """
        record = self.start()
        try:
            yield record
        except BaseException:
            record._clear()
            raise
        finally:
            self.stop()

    @property
    def recording(self) -> bool:
        """Whether calls are being recorded now."""
        return self._record is not None

    def start(self) -> Record:
        """Record from now on, for callers that cannot use a block; :meth:`stop` ends it.

        Raises:
            RuntimeError: this capture is recording already.
        """
        if self._record is not None:
            raise RuntimeError("this capture is recording already: leave the outer record() first")
        self._record = Record(self.blocks, self.positions)
        return self._record

    def stop(self) -> None:
        """End what :meth:`start` began."""
        self._record = None

    def remove(self) -> None:
        """Take the hooks off the layers; happens by itself when the capture is garbage."""
        self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        raise TypeError(
            "a Capture belongs to the layers it hooks and cannot be copied; make a new one for the copied model"
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
