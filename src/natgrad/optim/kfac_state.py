"""The checkpoint of :class:`natgrad.KFAC`: what is saved, and how a state is checked before anything changes.

The form is that of every ``torch.optim`` optimiser, so that ``torch.distributed.checkpoint`` takes it too: ``"state"``
holds tensors by parameter, and a layer's factors and inverses stand with its first parameter; the one entry of
``"param_groups"`` holds the numbers.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, diagonal
from natgrad.optim.inverses import LayerInverses
from natgrad.optim.layer_state import leaders, load_factors, same_keys, same_shape, save_layer, warn_of_threads

if TYPE_CHECKING:
    from natgrad.optim.kfac import KFAC

_VERSION = 1
_NUMBERS = (
    "update",
    "lambda",
    "gamma",
    "scale",
    "factor_updates",
    "skipped",
    "rejected",
    "shortened",
    "failed_inverses",
    "threads",
)


def save_tensors(kfac: "KFAC", inverses: LayerInverses | None = None) -> list[dict[str, Tensor]]:
    """Per parameter, in order: δ₀, and what belongs to the layer that the parameter leads.

    Args:
        kfac: the optimiser.
        inverses: to save in the place of its own.
    """
    inverses = kfac.proposals.inverses if inverses is None else inverses
    previous = kfac.layout.parameters(kfac._previous)
    leading = leaders(kfac._coverage.blocks)
    saved = []
    for name, parameter in kfac.view.parameters.items():
        state = {"previous": previous[name].detach().clone()}
        factors = kfac._running.factors
        if name in leading:
            layer = leading[name]
            state |= save_layer(kfac._coverage.blocks[layer], factors.get(layer), inverses)
            state |= inverses.cross_state(layer, factors, state["A"])
        elif name in kfac._evaluator.diagonal:
            block = factors.get(name)
            squares = diagonal(block.A) if block else torch.zeros_like(parameter)
            scale = diagonal(block.G) if block else parameter.new_zeros(1)
            state |= {
                "squared_gradients": squares.detach().view_as(parameter),
                "squared_gradients_scale": scale.detach(),
            }
        saved.append(state)
    return saved


def save_numbers(kfac: "KFAC") -> dict[str, Any]:
    """Everything that is no matrix: plain numbers, and the random stream."""
    updates = kfac._running.updates
    return {
        "version": _VERSION,
        "threads": torch.get_num_threads(),
        "update": kfac._update_number,
        "lambda": float(kfac._lam),
        "gamma": float(kfac._gamma),
        "scale": float(kfac.proposals.scale),
        "factor_updates": 0.0 if updates is None else float(updates),
        **{key: float(count) for key, count in kfac._counts.items()},
        "failed_inverses": kfac.proposals.inverses.failures,
        "generator": kfac._generator.get_state(),
        "coefficients": kfac.coefficients.values.clone(),
        **kfac.proposals.inverses.save_order(),
    }


def check(kfac: "KFAC", state: Any) -> tuple[Mapping[str, Any], list[Mapping[str, Tensor]]]:
    """The numbers and the tensors of a state, compared with the optimiser that shall load them.

    Raises:
        ValueError: something is missing, unknown or of another shape; it is named.
    """
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError(
            "state_dict: expected the mapping that KFAC.state_dict() returns, with 'state' and 'param_groups'"
        )
    groups = state["param_groups"]
    if len(groups) != 1 or len(groups[0].get("params", ())) != len(kfac.view.names):
        found = [len(group.get("params", ())) for group in groups]
        raise ValueError(
            f"state_dict: parameter groups of {found} parameters; this model has one of {len(kfac.view.names)}"
        )
    numbers = groups[0]
    missing = [key for key in ("version", "generator", "coefficients", *_NUMBERS) if key not in numbers]
    if missing:
        raise ValueError(f"state_dict['param_groups'][0] lacks {missing}: it is the state of another optimiser")
    if numbers["version"] != _VERSION:
        raise ValueError(f"state_dict: of version {numbers['version']}; this natgrad reads version {_VERSION}")
    for key in _NUMBERS:
        if not isinstance(numbers[key], int | float) or numbers[key] < 0:
            raise ValueError(f"state_dict: {key} is {numbers[key]!r}; expected a number that is not negative")
    same_shape("state_dict: generator", kfac._generator.get_state(), numbers["generator"])
    same_shape("state_dict: coefficients", kfac.coefficients.values, numbers["coefficients"])
    names = numbers.get("param_names")
    if names is not None and list(names) != list(kfac.view.names):
        other = next((f"{a!r} for {b!r}" for a, b in zip(names, kfac.view.names, strict=True) if a != b), "")
        raise ValueError(f"state_dict: of a model whose parameters have other names ({other})")
    tensors, inverses = [], kfac.proposals.inverses.in_order(numbers)
    for key, name, own in zip(groups[0]["params"], kfac.view.names, save_tensors(kfac, inverses), strict=True):
        if key not in state["state"]:
            raise ValueError(f"state_dict['state'] lacks parameter {name!r}")
        saved = state["state"][key]
        same_keys(f"parameter {name!r}", own, saved)
        for what, tensor in own.items():
            same_shape(f"parameter {name!r}: {what}", tensor, saved[what])
        tensors.append(saved)
    return numbers, tensors


def load(kfac: "KFAC", numbers: Mapping[str, Any], tensors: list[Mapping[str, Tensor]]) -> None:
    """Take over a state that was checked; dtypes are kept, nothing is shared with it."""
    warn_of_threads(numbers["threads"])
    device = kfac._previous.device
    kfac._update_number = int(numbers["update"])
    kfac._lam = torch.full_like(kfac._lam, numbers["lambda"])
    kfac._started = not kfac._lam.isnan()
    kfac._gamma = torch.full_like(kfac._gamma, numbers["gamma"])
    kfac.proposals.scale = torch.full_like(kfac._lam, numbers["scale"])
    kfac.proposals.inverses = kfac._evaluator.inverses = kfac.proposals.inverses.in_order(numbers)
    kfac.proposals.inverses.failures = int(numbers["failed_inverses"])
    kfac._generator.set_state(numbers["generator"].cpu())
    kfac.coefficients.values = numbers["coefficients"].to(kfac.coefficients.values, copy=True)
    for key, count in kfac._counts.items():
        count.fill_(numbers[key])
    known = kfac._update_number > 0
    kfac._running.updates = torch.full_like(kfac._lam, numbers["factor_updates"]) if known else None
    kfac._running.factors = {}
    previous, leading = kfac.layout.parameters(kfac._previous), leaders(kfac._coverage.blocks)
    diagonals: dict[str, Factors] = {}
    for name, saved in zip(kfac.view.names, tensors, strict=True):
        state = {key: value.detach().to(device) for key, value in saved.items()}
        previous[name].copy_(state["previous"])
        if name in leading:
            if known:
                kfac._running.factors[leading[name]] = load_factors(state)
            kfac.proposals.inverses.load(leading[name], state)
            if known and "cross_A" in state:
                pair = kfac.proposals.inverses.pairs[leading[name]]
                kfac._running.factors[pair] = Factors(state["cross_A"].clone(), state["cross_G"].clone())
        elif "squared_gradients" in state and known:
            squares, scale = state["squared_gradients"].flatten().clone(), state["squared_gradients_scale"].clone()
            diagonals[name] = Factors(Diagonal(squares), Diagonal(scale))
    kfac._running.factors |= diagonals
