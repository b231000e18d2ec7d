"""Which rule covers which kind of layer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from natgrad.layers.linear import LinearRule
from natgrad.layers.rules import Block, LayerRule, Sharing

Rules = Mapping[str, LayerRule]
# Kind → name of a block within the layer ("" for the only one) → its rule; or a function that says so of a layer.
_RULES: dict[type[nn.Module], Rules | Callable[[Any], Rules]] = {}


def register_layer(kind: type[nn.Module], rule: LayerRule | Rules | Callable[[Any], Rules]) -> None:
    """Cover layers of a kind of your own, everywhere in natgrad from now on.

    A layer is covered by the rule of its own class; one that inherits from it is covered too as long as it keeps the
    ``forward``, for otherwise it may compute something else. A rule for a class of ``torch.nn`` replaces natgrad's.

    Args:
        kind: the class of the layers.
        rule: an object of a :class:`natgrad.layers.KroneckerRule` or :class:`natgrad.layers.DiagonalRule`;
            :func:`natgrad.testing.check_layer` tests it. For a layer with several blocks: a mapping from their names,
            or a function from the layer to such a mapping where its settings say which blocks it has.

    Raises:
        TypeError: ``kind`` is no class of modules, or ``rule`` no object of a rule.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind: expected a subclass of torch.nn.Module, got {kind!r}")
    if inspect.isfunction(rule):
        _RULES[kind] = rule
        return
    rules: dict[str, Any] = dict(rule) if isinstance(rule, Mapping) else {"": rule}
    for found in rules.values():
        if not isinstance(found, LayerRule):
            what = f"the class {found.__name__}; make an object of it" if isinstance(found, type) else repr(found)
            raise TypeError(f"rule: expected an object of a KroneckerRule or DiagonalRule, got {what}")
    _RULES[kind] = rules


def rules_for(layer: nn.Module) -> Rules | None:
    """The rules of a layer's kind by the names of their blocks, or None where no rule covers it."""
    for kind in type(layer).__mro__:
        if kind in _RULES:
            own = type(layer).forward is kind.forward and "forward" not in vars(layer)
            found = _RULES[kind]
            return (found if isinstance(found, Mapping) else found(layer)) if own else None
    return None


def known_kind(layer: nn.Module) -> bool:
    """Whether a layer is of a known kind or inherits from one."""
    return any(kind in _RULES for kind in type(layer).__mro__)


def block_of(name: str, layer: Any, sharing: Sharing = "expand") -> Block:
    """The block of a layer by itself; its parameters have the names of the attributes.

    Raises:
        TypeError: no rule covers the layer's kind, or several blocks belong to it.
    """
    rules = rules_for(layer)
    if rules is None or list(rules) != [""]:
        raise TypeError(f"{name}: no single rule covers {type(layer).__name__}; see natgrad.register_layer")
    rule = rules[""]
    prefix = f"{name}." if name else ""
    members = {key: prefix + key for key, p in rule.parameters(layer).items() if p.requires_grad}
    return Block(name, rule, (layer,), members, sharing)


def blocks_of(layers: Mapping[str, Any]) -> dict[str, Block]:
    """Blocks by name; a bare layer gets that of its kind, one of unknown kind is just recorded."""
    found = {}
    for name, x in layers.items():
        if isinstance(x, Block):
            found[name] = x
        else:
            found[name] = block_of(name, x) if rules_for(x) else Block(name, LinearRule(), (x,), {})
    return found
