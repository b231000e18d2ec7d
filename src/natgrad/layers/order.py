"""The order of layers in a forward pass, from the graph that it left."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def chain_of(outputs: Mapping[str, Sequence[Any]], z: Tensor) -> tuple[str, ...]:
    """The layers in forward order, where they form a chain.

    A chain: every layer is used once and takes the output of one other layer, the one before it; z depends on the last
    one directly. What lies between the layers (activations, normalisation, layers without factors) does not matter.

    Args:
        outputs: by layer name, the graph node of the output of every call (None for an output without a gradient).
        z: the output of the model, with its graph.

    Raises:
        ValueError: the layers do not form a chain; says where, and proposes ``structure='block_diagonal'``.
    """
    for name, nodes in outputs.items():
        if len(nodes) != 1 or nodes[0] is None:
            used = "without a gradient" if nodes and None in nodes else f"{len(nodes)} times"
            raise _no_chain(f"layer {name!r} was used {used} in the forward pass; expected once")
    ends = {nodes[0]: name for name, nodes in outputs.items()}
    before = {name: _met_first([node for node, _ in nodes[0].next_functions], ends) for name, nodes in outputs.items()}
    last = _met_first([z.grad_fn], ends)
    if len(last) != 1:
        raise _no_chain(f"the output depends directly on {_named(last)}; expected one layer")
    order: list[str] = []
    name: str | None = last[0]
    while name is not None:
        if len(before[name]) > 1:
            raise _no_chain(f"layer {name!r} takes the outputs of {_named(before[name])}; expected one layer")
        order.append(name)
        name = before[name][0] if before[name] else None
    left = [name for name in outputs if name not in order]
    if left:
        raise _no_chain(f"the output does not depend on {_named(left)} by way of {_named(order[::-1])}")
    return tuple(reversed(order))


def _met_first(start: Iterable[Any], ends: Mapping[Any, str]) -> list[str]:
    """The layers whose outputs are met first on the way back through the graph."""
    todo, seen, found = [node for node in start if node is not None], set(), []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.append(ends[node])
        else:
            todo.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def _named(names: Iterable[str]) -> str:
    names = [repr(name) for name in sorted(names)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "no layer"


def _no_chain(what: str) -> ValueError:
    return ValueError(
        f"structure='block_tridiagonal' needs a chain of layers, each fed by the one before it: {what}. Use "
        "structure='block_diagonal' for this model"
    )
