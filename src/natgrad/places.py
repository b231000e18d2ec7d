"""Under which names the tensors of a module are found, so that ``functional_call`` can put others into their places."""

from torch import Tensor, nn


def places_of(module: nn.Module, prefix: str = "") -> tuple[dict[str, list[str]], list[tuple[Tensor, list[str]]]]:
    """All names of what belongs together, a module that occurs twice being one place.

    ``functional_call`` with ``tie_weights=True`` replaces the tensors of such a module under both names, restores them
    in the same order, and thereby leaves the second replacement in the model (torch 2.13).

    Args:
        module: of any kind.
        prefix: of all names.

    Returns:
        of every parameter's name the names of that parameter; and for each buffer a copy with its names.
    """
    places: dict[str, list[str]] = {}
    tied: dict[int, list[str]] = {}
    buffers: dict[int, tuple[Tensor, list[str]]] = {}
    seen: set[nn.Module] = set()
    waiting = [(prefix, module)]
    while waiting:  # named_modules() takes three times as long
        path, owner = waiting.pop()
        if owner in seen:
            continue
        seen.add(owner)
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                together = places[path + key] = tied.setdefault(id(parameter), [])
                together.append(path + key)
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                if id(buffer) not in buffers:
                    buffers[id(buffer)] = buffer.detach().clone(), []
                buffers[id(buffer)][1].append(path + key)
        children = [(f"{path}{key}.", child) for key, child in owner._modules.items() if child is not None]
        waiting.extend(reversed(children))  # the first comes first: it gives the names
    return places, list(buffers.values())
