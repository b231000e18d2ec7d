"""What a graph of automatic differentiation says about how an output was computed."""

from typing import Any

from torch import Tensor


def graph_of(start: Any) -> set[Any]:
    """The nodes that a node was computed from, with itself; none for None."""
    seen: set[Any] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen


def uses_reentrant_checkpoint(z: Tensor) -> bool:
    """Whether the graph of z holds a reentrant checkpoint, under which layers run without a graph of their own."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_of(z.grad_fn))
