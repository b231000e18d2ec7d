"""Settings that differ from layer to layer: which damping holds where."""

import math
from collections.abc import Iterable, Mapping

DEFAULT_DAMPING = 3e-3


def is_within(name: str, module: str) -> bool:
    """Whether a layer or parameter is the module of that name or inside it; ``""`` is the whole model."""
    return not module or name == module or name.startswith(f"{module}.")


def damping_by_layer(
    given: float | Mapping[str, float], layers: Iterable[str], present: Mapping[str, float] | None = None
) -> dict[str, float]:
    """λ of every layer.

    Args:
        given: one number; or λ by name of a layer or of a module around layers, the innermost one deciding, with
            ``""`` for the whole model.
        layers: the names of all covered layers.
        present: λ of layers that a mapping says nothing of; the default where there is none.

    Raises:
        TypeError: something else than a number, or a mapping to numbers.
        ValueError: a number that is not positive, or a name without a layer.
    """
    layers = list(layers)
    if not isinstance(given, Mapping):
        return dict.fromkeys(layers, _positive(given, "damping"))
    values = {name: _positive(value, f"damping[{name!r}]") for name, value in given.items()}
    for name in values:
        if not any(is_within(layer, name) for layer in layers):
            raise ValueError(f"damping: no covered layer is or is inside {name!r}; there are {layers}")
    found = {}
    for layer in layers:
        names = [name for name in values if is_within(layer, name)]
        rest = DEFAULT_DAMPING if present is None else present[layer]
        found[layer] = values[max(names, key=len)] if names else rest
    return found


def uniform(damping: Mapping[str, float]) -> float | dict[str, float]:
    """The number, where all layers have the same one; otherwise the numbers by layer."""
    values = set(damping.values())
    return values.pop() if len(values) == 1 else dict(damping)


def layers_by_damping(damping: Mapping[str, float]) -> dict[float, list[str]]:
    """The layers of each λ."""
    found: dict[float, list[str]] = {}
    for name, value in damping.items():
        found.setdefault(value, []).append(name)
    return found


def _positive(value: float, what: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{what}: expected a number, or a mapping from names of layers to numbers; got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{what}={value}: expected a positive number, such as 3e-3")
    return float(value)
