"""Which layers get Kronecker factors, and which trainable parameters no factor covers."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from natgrad.model_view import ModelView, clean_name

Uncovered = Literal["error", "identity", "diagonal"]


@dataclass(frozen=True)
class Coverage:
    """What is treated how; ``str()`` is a table with parameter counts.

    Attributes:
        layers: the covered layers by clean name, in the order of the modules.
        members: per covered layer its trainable parameters (weight name or None, bias name or None), by parameter name.
        reasons: per uncovered parameter, why no factor covers it.
        sizes: the number of elements of every trainable parameter.
        treatment: of the uncovered parameters: ``"error"``, ``"identity"`` or ``"diagonal"``.
    """

    layers: dict[str, nn.Linear]
    members: dict[str, tuple[str | None, str | None]]
    reasons: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)
    treatment: str = "error"

    @property
    def uncovered(self) -> tuple[str, ...]:
        """The names of the trainable parameters that no factor covers."""
        return tuple(self.reasons)

    def __str__(self) -> str:
        """A table: name, treatment, number of parameters."""
        rows = []
        for name, members in self.members.items():
            layer = self.layers[name]
            count = sum(self.sizes[member] for member in members if member is not None)
            columns = (layer.in_features if members[0] is not None else 0) + (members[1] is not None)
            rows.append((name or "(model)", f"Kronecker {columns} x {layer.out_features}", count))
        rows += [(name, f"{self.treatment} ({reason})", self.sizes[name]) for name, reason in self.reasons.items()]
        covered = sum(count for _, _, count in rows[: len(self.members)])
        rows.append(("total", f"{covered} covered, {sum(self.sizes.values()) - covered} not", sum(self.sizes.values())))
        widths = [max(len(str(row[i])) for row in rows) for i in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def cover(view: ModelView, uncovered: Uncovered = "error") -> Coverage:
    """Find the ``nn.Linear`` layers that Kronecker factors cover.

    A layer's block holds those of its weight and bias that are trained: with a frozen bias A has no homogeneous
    coordinate, with a frozen weight it is that coordinate alone. Not covered is a layer that shares a parameter with
    another module, one whose weight is computed (parametrizations), one with a ``forward`` of its own, and the
    projections inside ``nn.MultiheadAttention``, which are used without being called.

    Args:
        view: the model.
        uncovered: what happens to trainable parameters that no factor covers.

    Raises:
        ValueError: an unknown ``uncovered``; or it is ``"error"`` and a parameter is not covered (each is named).
    """
    if uncovered not in get_args(Uncovered):
        raise ValueError(f"uncovered={uncovered!r}: expected one of {', '.join(map(repr, get_args(Uncovered)))}")
    parameters = view.parameters
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    owners = Counter(id(p) for module in view.module.modules() for p in set(_own_parameters(module)))
    in_attention = {
        id(child)
        for m in view.module.modules()
        if isinstance(m, nn.MultiheadAttention)
        for child in m.modules()
        if child is not m
    }
    layers: dict[str, nn.Linear] = {}
    members: dict[str, tuple[str | None, str | None]] = {}
    reasons: dict[str, str] = {}
    for raw_name, module in view.module.named_modules():
        own = [p for p in _own_parameters(module) if id(p) in name_of]
        if not own:
            continue
        reason = _reason(module, own, owners, in_attention)
        if reason is None and isinstance(module, nn.Linear):  # nothing else is without a reason
            name = clean_name(raw_name) if raw_name else ""
            layers[name] = module
            members[name] = (name_of.get(id(module.weight)), name_of.get(id(module.bias)))
            continue
        for p in own:
            reasons.setdefault(name_of[id(p)], reason or "no Linear layer")
    if reasons and uncovered == "error":
        named = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise ValueError(
            f"no Kronecker factor covers {named}; freeze them with requires_grad_(False), or pass uncovered='identity' "
            "or uncovered='diagonal' to say how they are treated"
        )
    ordered = {name: reasons[name] for name in parameters if name in reasons}
    return Coverage(layers, members, ordered, {name: p.numel() for name, p in parameters.items()}, uncovered)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _reason(module: nn.Module, own: list[nn.Parameter], owners: Counter[int], in_attention: set[int]) -> str | None:
    """Why no factor covers a module's parameters, or None where one does."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        return kind
    if any(owners[id(p)] > 1 for p in own):
        return f"{kind}, shared with another module"
    if id(module) in in_attention:
        return f"{kind} inside MultiheadAttention"
    if module._parameters.get("weight") is None:
        return f"{kind} with a computed weight"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"{kind} with a forward of its own"
    return None
