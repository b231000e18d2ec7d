"""What a graph of automatic differentiation says about how an output was computed."""

from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

# Nodes of products whose outputs torch shows in another shape: a linear layer's with positions, a convolution's without
# examples.
_INNER = ("Addmm", "Mm", "Convolution", "SlowConv", "Mkldnn", "Linear")


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


def edge_of(output: Tensor) -> GradientEdge:
    """Where in the graph the output of a layer is, also if it is changed in place later.

    For a view that would not do: to change one in place gives it another history, without the node that made it. So
    the edge of a product that a layer returns in another shape is that of the product; derivatives have its shape.
    """
    base = output._base if output._is_view() else None
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return get_gradient_edge(output)
    whole = base.is_contiguous() and output.is_contiguous()
    return get_gradient_edge(base if whole and base.grad_fn.name().startswith(_INNER) else output)


def uses_reentrant_checkpoint(z: Tensor) -> bool:
    """Whether the graph of z holds a reentrant checkpoint, under which layers run without a graph of their own."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_of(z.grad_fn))
