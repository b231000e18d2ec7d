"""Output derivatives of recorded layers, read off while somebody else's backward pass makes them.

A hook in front of the node that computed an output sees the derivative with respect to that output, whatever happened
to it in place later (see :mod:`natgrad.layers.capture`), and no backward pass of its own is needed.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from natgrad.layers.capture import Record


class Passing:
    """Calls back when a backward pass reaches z, and when it reaches the output of each recorded call.

    The graph holds the hooks, the hooks hold this object weakly: nothing stays behind when it goes.

    Args:
        record: of the forward pass, with the calls that z depends on.
        z: its output.
        at_output: gets the derivative with respect to z (None for none), before any layer's.
        at_layer: gets name, number of the call and derivative (None for none).
    """

    def __init__(
        self,
        record: Record,
        z: Tensor,
        at_output: Callable[[Tensor | None], None],
        at_layer: Callable[[str, int, Tensor | None], None],
    ) -> None:
        self._at_output, self._at_layer = at_output, at_layer
        edges: list[tuple[tuple[str, int] | None, Any]] = [(None, get_gradient_edge(z))]
        for name, found in record.edges.items():
            edges += [((name, i), edge) for i, edge in enumerate(found) if edge is not None]
        self._shapes = {call: record.shape_of(*call) for call, _ in edges if call is not None}
        self._handles = [edge.node.register_prehook(_Reached(self, call, edge.output_nr)) for call, edge in edges]

    def remove(self) -> None:
        """Take the hooks off the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _reached(self, call: tuple[str, int] | None, gradient: Tensor | None) -> None:
        if call is None:
            self._at_output(gradient)
        else:
            self._at_layer(*call, None if gradient is None else gradient.reshape(self._shapes[call]))


class _Reached:
    def __init__(self, owner: Passing, call: tuple[str, int] | None, number: int) -> None:
        self._owner, self._call, self._number = weakref.ref(owner), call, number

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        owner = self._owner()
        if owner is not None:
            owner._reached(self._call, gradients[self._number])
