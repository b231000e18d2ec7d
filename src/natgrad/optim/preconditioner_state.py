"""The checkpoint of a `Preconditioner`: what is saved, and how a state is checked before anything changes."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, to_dense

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
        "damping": pre._damping,
        "failed_inverses": pre._inverses.failures,
        "skipped": pre._skipped,
        "updates": zero if pre._running.updates is None else pre._running.updates,
        "generator": pre._generator.get_state(),
        "layers": {name: _layer(pre, name) for name in pre._coverage.layers},
    }


def load(pre: "Preconditioner", state: Mapping[str, Any]) -> None:
    """Check a state, then take it over.

    Raises:
        ValueError: it does not fit; nothing was changed.
    """
    check(pre, state)
    if state["threads"] != torch.get_num_threads():
        warnings.warn(
            f"the state was saved with {state['threads']} threads and is loaded with {torch.get_num_threads()}: "
            "factorisations differ in the last digits",
            stacklevel=3,
        )
    device = pre._skipped.device
    pre._steps, pre._observed = int(state["steps"]), bool(state["observed"])
    pre._damping, pre._inverses.failures = float(state["damping"]), int(state["failed_inverses"])
    pre._skipped = state["skipped"].detach().to(device, copy=True)
    pre._generator.set_state(state["generator"].cpu())
    updates = state["updates"].detach().to(device, copy=True)
    known = bool(updates > 0) or any(bool(torch.any(layer["A"] != 0)) for layer in state["layers"].values())
    pre._running.updates = updates if known else None
    pre._running.factors = {}
    for name, saved in state["layers"].items():
        layer = {key: value.detach().to(device) for key, value in saved.items()}
        if known:
            pre._running.factors[name] = Factors(_factor(layer, "A"), _factor(layer, "G"))
        pre._inverses.load(name, layer)
    pre._pending = None
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
    _same_keys("state_dict", own, state)
    if state["version"] != _VERSION:
        raise ValueError(f"state_dict: of version {state['version']}; this natgrad reads version {_VERSION}")
    for key in ("threads", "steps", "damping", "failed_inverses"):
        if not isinstance(state[key], int | float) or not state[key] >= 0:
            raise ValueError(f"state_dict[{key!r}]: expected a number that is not negative, got {state[key]!r}")
    for key in ("skipped", "updates", "generator"):
        _same_shape(f"state_dict[{key!r}]", own[key], state[key])
    if not isinstance(state["layers"], Mapping):
        raise ValueError(f"state_dict['layers']: expected a mapping, got {type(state['layers']).__name__}")
    _same_keys("state_dict: the layers of the model", own["layers"], state["layers"])
    for name, layer in own["layers"].items():
        _same_keys(f"layer {name!r}", layer, state["layers"][name])
        for key, value in layer.items():
            _same_shape(f"layer {name!r}: {key}", value, state["layers"][name][key])


def _layer(pre: "Preconditioner", name: str) -> dict[str, Tensor]:
    layer, (weight, bias) = pre._coverage.layers[name], pre._parts[name]
    out, columns = layer.out_features, layer.in_features * weight + bias
    like = torch.zeros((), dtype=torch.promote_types(layer.weight.dtype, torch.float32), device=layer.weight.device)
    factors = pre._running.factors.get(name)
    if factors is None:
        factors = Factors(like.new_zeros(columns, columns), like.new_zeros(out, out))
    state = {}
    for key, factor in (("A", factors.A), ("G", factors.G)):
        state[key], state[f"{key}_diagonal"] = to_dense(factor), torch.tensor(isinstance(factor, Diagonal))
    return state | pre._inverses.state(name, columns, out, like)


def _factor(layer: Mapping[str, Tensor], key: str) -> Tensor | Diagonal:
    matrix = layer[key]
    return Diagonal(matrix.diagonal().clone()) if bool(layer[f"{key}_diagonal"]) else matrix.clone()


def _same_keys(what: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    missing, unknown = [k for k in own if k not in other], [k for k in other if k not in own]
    if missing or unknown:
        parts = [f"lacks {missing}" if missing else "", f"has unknown {unknown}" if unknown else ""]
        raise ValueError(
            f"{what}: the state {' and '.join(part for part in parts if part)}; it is that of another model, or of a "
            "Preconditioner with another form= or structure="
        )


def _same_shape(what: str, own: Tensor, other: Any) -> None:
    if not isinstance(other, Tensor) or other.shape != own.shape:
        got = f"shape {tuple(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
        raise ValueError(f"{what}: expected a tensor of shape {tuple(own.shape)}, got {got}")
    if other.dtype.is_floating_point != own.dtype.is_floating_point:
        raise ValueError(f"{what}: expected a tensor like {own.dtype}, got {other.dtype}")
