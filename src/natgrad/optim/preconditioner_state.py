"""The checkpoint of a `Preconditioner`: what is saved, and how a state is checked before anything changes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from natgrad.optim.layer_state import load_factors, same_keys, same_shape, save_layer, warn_of_threads

if TYPE_CHECKING:
    from natgrad.optim.preconditioner import Preconditioner

_VERSION = 1


def save(pre: "Preconditioner") -> dict[str, Any]:
    """The state of a preconditioner; tensors in use are not copied."""
    device = pre._skipped.device
    zero = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    return {
        "version": _VERSION,
        "threads": torch.get_num_threads(),
        "steps": pre._steps,
        "observed": pre._observed,
        "failed_inverses": pre._inverses.failures,
        "missed": pre._pending.missed,
        "skipped": pre._skipped,
        "nonfinite": pre._nonfinite,
        "updates": zero if pre._running.updates is None else pre._running.updates,
        "generator": pre._generator.get_state(),
        "layers": {
            name: save_layer(block, pre._running.factors.get(name), pre._inverses)
            | {"damping": torch.tensor(pre._damping[name], dtype=torch.float64)}
            for name, block in pre._coverage.blocks.items()
        },
    }


def load(pre: "Preconditioner", state: Mapping[str, Any]) -> None:
    """Check a state, then take it over.

    Raises:
        ValueError: it does not fit; nothing was changed.
    """
    check(pre, state)
    warn_of_threads(state["threads"])
    device = pre._skipped.device
    pre._steps, pre._observed = int(state["steps"]), bool(state["observed"])
    pre._pending.missed, pre._inverses.failures = int(state["missed"]), int(state["failed_inverses"])
    pre._skipped = state["skipped"].detach().to(device, copy=True)
    pre._nonfinite = state["nonfinite"].detach().to(device, copy=True)
    pre._generator.set_state(state["generator"].cpu())
    updates = state["updates"].detach().to(device, copy=True)
    known = bool(updates > 0) or any(bool(torch.any(layer["A"] != 0)) for layer in state["layers"].values())
    pre._running.updates = updates if known else None
    pre._running.factors = {}
    for name, saved in state["layers"].items():
        pre._damping[name] = float(saved["damping"])
        layer = {key: value.detach().to(device) for key, value in saved.items() if key != "damping"}
        if known and bool(torch.any(layer["A"] != 0)):  # otherwise no output that was observed depends on it
            pre._running.factors[name] = load_factors(layer)
        pre._inverses.load(name, layer)
    pre._pending.clear()
    pre._watch.clear()
    pre._watch.active = pre.due


def check(pre: "Preconditioner", state: Mapping[str, Any]) -> None:
    """Compare a state with the preconditioner that shall load it.

    Raises:
        ValueError: something is missing, unknown, or of another shape; it is named.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict: expected a mapping from Preconditioner.state_dict(), got {type(state).__name__}")
    own = save(pre)
    same_keys("state_dict", own, state)
    if state["version"] != _VERSION:
        raise ValueError(f"state_dict: of version {state['version']}; this natgrad reads version {_VERSION}")
    for key in ("threads", "steps", "missed", "failed_inverses"):
        if not isinstance(state[key], int | float) or not state[key] >= 0:
            raise ValueError(f"state_dict[{key!r}]: expected a number that is not negative, got {state[key]!r}")
    for key in ("skipped", "nonfinite", "updates", "generator"):
        same_shape(f"state_dict[{key!r}]", own[key], state[key])
    if not isinstance(state["layers"], Mapping):
        raise ValueError(f"state_dict['layers']: expected a mapping, got {type(state['layers']).__name__}")
    same_keys("state_dict: the layers of the model", own["layers"], state["layers"])
    for name, layer in own["layers"].items():
        same_keys(f"layer {name!r}", layer, state["layers"][name])
        for key, value in layer.items():
            same_shape(f"layer {name!r}: {key}", value, state["layers"][name][key])
