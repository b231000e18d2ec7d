"""Which layers get factors, and which trainable parameters no factor covers."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from natgrad.layers.bare import BareRule
from natgrad.layers.kinds import refused
from natgrad.layers.registry import known_kind, rules_for
from natgrad.layers.rules import Block, KroneckerRule, LayerRule, check_sharing, of_weight_alone
from natgrad.model_view import ModelView, clean_name

Uncovered = Literal["error", "identity", "diagonal"]

EXCLUDED = "excluded"
# Structures in which a parameter may be a block by itself.
_WITH_BARE = BareRule.structures
_NOT_IN_STRUCTURE = "which structure"


@dataclass(frozen=True)
class Coverage:
    """What is treated how; ``str()`` is a table with parameter counts.

    Attributes:
        layers: the covered layers by the clean name of their block, in the order of the modules.
        members: per block its trainable parameters by parameter name; of a layer with weight and bias (weight or None,
            bias or None).
        reasons: per uncovered parameter, why no factor covers it.
        sizes: the number of elements of every trainable parameter.
        treatment: of the uncovered parameters: ``"error"``, ``"identity"`` or ``"diagonal"``.
        blocks: the layers with their rules, by the same names.
        notes: lines below the table, such as what share of a batch the factors are made of.
    """

    layers: dict[str, Any]
    members: dict[str, tuple[str | None, ...]]
    reasons: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)
    treatment: str = "error"
    blocks: dict[str, Block] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def uncovered(self) -> tuple[str, ...]:
        """The names of the trainable parameters that no factor covers."""
        return tuple(self.reasons)

    def __str__(self) -> str:
        """A table: name, treatment, number of parameters."""
        rows = []
        for name, block in self.blocks.items():
            count = sum(self.sizes[member] for member in block.members.values())
            rows.append((name or "(model)", block.describe(), count))
        for name, reason in self.reasons.items():
            treatment = "identity" if reason == EXCLUDED else self.treatment
            rows.append((name, f"{treatment} ({reason})", self.sizes[name]))
        covered = sum(count for _, _, count in rows[: len(self.blocks)])
        rows.append(("total", f"{covered} covered, {sum(self.sizes.values()) - covered} not", sum(self.sizes.values())))
        widths = [max(len(str(row[i])) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        return "\n".join([*lines, *self.notes])


def cover(
    view: ModelView,
    uncovered: Uncovered = "error",
    structure: str = "block_diagonal",
    sharing: str | Mapping[str, str] = "expand",
    exclude: Collection[str] = (),
    *,
    bare: bool = False,
) -> Coverage:
    """Find the layers that have rules, and the parameters that no rule covers.

    A layer's block holds those of its parameters that are trained: with a frozen bias A has no homogeneous coordinate,
    with a frozen weight it is that coordinate alone. Layers of one kind that share all of their parameters are one
    block; those that share the weight alone are one of the weight, and their biases are diagonal. A parameter that a
    module of your own holds itself has a diagonal block. Not covered is a layer that shares a parameter with another
    one in any other way, one whose weight is computed (parametrizations), one with a ``forward`` of its own, and one
    whose rule does not know the structure.

    Args:
        view: the model.
        uncovered: what happens to trainable parameters that no factor covers.
        structure: of the curvature; ``"layerwise"`` for methods that treat each ``nn.Linear`` by itself.
        sharing: how positions count, ``"expand"`` or ``"reduce"``; or a mapping from layer names (others expand).
        exclude: names of modules (with all inside them), layers or bare parameters that are left uncovered on purpose.
        bare: with ``uncovered="diagonal"``, whether those parameters are blocks like the bare ones, so that nothing is
            left uncovered; otherwise their diagonal is for the caller to find.

    Raises:
        TypeError: ``exclude`` is one string.
        ValueError: an unknown ``uncovered`` or ``sharing``, a name in ``exclude`` that nothing has; or ``uncovered`` is
            ``"error"`` and a parameter is not covered (each is named); or a parameter that cannot have a diagonal.
    """
    if uncovered not in get_args(Uncovered):
        raise ValueError(f"uncovered={uncovered!r}: expected one of {', '.join(map(repr, get_args(Uncovered)))}")
    parameters = view.parameters
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    finder = _Finder(view, structure, sharing)
    blocks: dict[str, Block] = {}
    reasons: dict[str, str] = {}
    for name, module, rule, attributes in finder.candidates():
        own = {key: p for key, p in attributes.items() if id(p) in name_of}
        if not own:
            continue
        reason = finder.reason(module, rule, own)
        if reason is None and rule is not None:
            members = {key: name_of[id(p)] for key, p in own.items()}
            if finder.leads(module, own):
                blocks[name] = Block(name, rule, finder.sharers(module, own), members, finder.sharing_of(name, rule))
            continue
        for p in own.values():
            reasons.setdefault(name_of[id(p)], reason or type(module).__name__)
    for name in _excluded(exclude, blocks, reasons):
        reasons |= dict.fromkeys(blocks.pop(name).members.values() if name in blocks else [name], EXCLUDED)
    covered = {member for block in blocks.values() for member in block.members.values()}
    ordered = {name: reasons[name] for name in parameters if name in reasons and name not in covered}
    unwanted = {name: reason for name, reason in ordered.items() if reason != EXCLUDED}
    if unwanted and uncovered == "error":
        named = ", ".join(f"{name} ({reason})" for name, reason in unwanted.items())
        wider = (
            "use structure='block_diagonal', "
            if _NOT_IN_STRUCTURE in named and structure == "block_tridiagonal"
            else ""
        )
        diagonal = " or uncovered='diagonal'" if structure not in ("layerwise", "input_covariance") else ""
        raise ValueError(
            f"no factor covers {named}; {wider}freeze them with requires_grad_(False), pass uncovered='identity'"
            f"{diagonal} to say how they are treated, or give their kind a rule with natgrad.register_layer"
        )
    if bare and uncovered == "diagonal":
        blocks |= finder.bare(unwanted)
        ordered = {name: reason for name, reason in ordered.items() if reason == EXCLUDED}
    finder.check_names(blocks)
    sizes = {name: p.numel() for name, p in parameters.items()}
    layers = {name: block.layer for name, block in blocks.items()}
    members = {name: _members(block) for name, block in blocks.items()}
    return Coverage(layers, members, ordered, sizes, uncovered, blocks)


class _Finder:
    """Walks over a model's modules; knows who holds which parameter."""

    def __init__(self, view: ModelView, structure: str, sharing: str | Mapping[str, str]) -> None:
        self.view, self.structure, self.sharing = view, structure, sharing
        for word in sharing.values() if isinstance(sharing, Mapping) else (sharing,):
            check_sharing(word)
        modules = list(view.module.modules())
        self.holders: dict[int, list[nn.Module]] = defaultdict(list)
        for module in modules:
            for p in dict.fromkeys(_own_parameters(module).values()):
                self.holders[id(p)].append(module)
        attention = [m for m in modules if isinstance(m, nn.MultiheadAttention)]
        self.inside_attention = {id(child) for m in attention for child in m.modules() if child is not m}

    def candidates(self) -> Iterator[tuple[str, nn.Module, LayerRule | None, dict[str, nn.Parameter]]]:
        """(block name, module, rule or None, its parameters by attribute) of every group of parameters."""
        for raw_name, module in self.view.module.named_modules():
            name = clean_name(raw_name) if raw_name else ""
            rest = _own_parameters(module)
            rules = rules_for(module) if id(module) not in self.inside_attention else None
            for suffix, rule in (rules or {}).items():
                rule = self._apart(module, rule)
                found = rule.parameters(module)
                yield ".".join(part for part in (name, suffix) if part), module, rule, found
                rest = {key: p for key, p in rest.items() if all(p is not other for other in found.values())}
            inside = id(module) in self.inside_attention and isinstance(module, nn.Linear)
            if inside and any(m is not None and rules_for(m) for m in self._around(module)):
                continue  # a block of the attention module
            for key, p in rest.items():
                bare = rules is not None or _is_own(module)
                yield ".".join(part for part in (name, key) if part), module, BareRule(key) if bare else None, {key: p}

    def reason(self, module: nn.Module, rule: LayerRule | None, own: Mapping[str, nn.Parameter]) -> str | None:
        """Why no factor covers a module's parameters, or None where one does."""
        kind = type(module).__name__
        if rule is None:
            if id(module) in self.inside_attention:
                return f"{kind} inside MultiheadAttention"
            if known_kind(module):
                if nn.utils.parametrize.is_parametrized(module):
                    return f"{kind} with a computed weight"
                return f"{kind} with a forward of its own"
            return refused(module) or kind
        held = [self._holders(module, p) for p in own.values()]
        sharers = held[0]
        same = all(found == sharers for found in held)
        if len(sharers) > 1 or not same:
            others = [self._module(i) for i in set().union(*map(set, held))]
            alike = same and all(self._alike(m, module, rule.attributes) for m in others)
            if isinstance(rule, BareRule) or not alike or not rule.captured or self.structure == "layerwise":
                return f"{kind}, shared with another module"
        if "weight" in rule.attributes and module._parameters.get("weight") is None and not isinstance(rule, BareRule):
            if getattr(module, "weight", None) is not None and rule.captured:
                return f"{kind} with a computed weight"
        refusal = rule.refuse(module)
        if refusal is not None:
            return f"{kind} {refusal}"
        if self.structure not in rule.structures_of(module):
            if self.structure == "layerwise":
                return kind
            return f"{kind}, {_NOT_IN_STRUCTURE} {self.structure!r} does not cover"
        return None

    def leads(self, module: nn.Module, own: Mapping[str, nn.Parameter]) -> bool:
        """Whether a module is the first of those that share its parameters."""
        return self._holders(module, next(iter(own.values())))[0] == id(module)

    def sharers(self, module: nn.Module, own: Mapping[str, nn.Parameter]) -> tuple[nn.Module, ...]:
        """The modules that share the parameters, in order."""
        return tuple(self._module(i) for i in self._holders(module, next(iter(own.values()))))

    def sharing_of(self, name: str, rule: LayerRule) -> Any:
        """The word for one block."""
        if not rule.shares:
            return "expand"
        return self.sharing.get(name, "expand") if isinstance(self.sharing, Mapping) else self.sharing

    def bare(self, reasons: Mapping[str, str]) -> dict[str, Block]:
        """Diagonal blocks of parameters that no other rule covers, by name.

        Args:
            reasons: per parameter, why none does.

        Raises:
            ValueError: the structure takes no derivatives, or those of a parameter are sparse.
        """
        if reasons and self.structure not in BareRule.structures:
            raise ValueError(
                f"uncovered='diagonal': structure={self.structure!r} takes no derivatives, so that nothing is known of "
                f"{', '.join(reasons)}; pass uncovered='identity'"
            )
        found = {}
        for raw_name, module in self.view.module.named_modules():
            for key, p in _own_parameters(module).items():
                name = clean_name(f"{raw_name}.{key}" if raw_name else key)
                if name in reasons and self.view.parameters.get(name) is p:
                    if getattr(module, "sparse", False):
                        raise ValueError(
                            f"uncovered='diagonal': {name} has sparse gradients; pass uncovered='identity'"
                        )
                    found[name] = Block(name, BareRule(key, reasons[name]), (module,), {key: name})
        return {name: found[name] for name in reasons}

    def check_names(self, blocks: Mapping[str, Block]) -> None:
        """Refuse names in ``sharing`` that no block has."""
        unknown = [name for name in self.sharing if name not in blocks] if isinstance(self.sharing, Mapping) else []
        if unknown:
            raise ValueError(f"sharing: no covered layer is called {unknown[0]!r}; there are {list(blocks)}")

    def _holders(self, module: nn.Module, p: nn.Parameter) -> list[int]:
        found = [id(m) for m in self.holders[id(p)]]
        return found if id(module) in found else [id(module)]  # out_proj's parameters, held by a child

    def _module(self, identity: int) -> nn.Module:
        return next(m for m in self.view.module.modules() if id(m) == identity)

    def _around(self, module: nn.Module) -> list[nn.Module | None]:
        return [m for m in self.view.module.modules() if isinstance(m, nn.MultiheadAttention) and m.out_proj is module]

    def _alike(self, one: nn.Module, two: nn.Module, attributes: Collection[str] = ()) -> bool:
        """Whether two modules are of one kind with the same parameters, or with the same ones of some names."""
        a, b = _own_parameters(one), _own_parameters(two)
        keys = [key for key in attributes if key in a or key in b] or a.keys() | b.keys()
        return type(one) is type(two) and all(a.get(key) is b.get(key) for key in keys)

    def _apart(self, module: nn.Module, rule: LayerRule) -> LayerRule:
        """The rule, without the bias where modules share the weight and not the bias."""
        weight = module._parameters.get("weight")
        if self.structure not in _WITH_BARE or weight is None or not isinstance(rule, KroneckerRule):
            return rule
        if rule.attributes != ("weight", "bias") or not rule.captured:
            return rule
        others = [self._module(i) for i in self._holders(module, weight)]
        return rule if all(self._alike(m, module) for m in others) else of_weight_alone(rule)


def _excluded(exclude: Collection[str], blocks: Mapping[str, Block], reasons: Mapping[str, str]) -> list[str]:
    """The blocks and the uncovered parameters that are, or are inside, what somebody named."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude={exclude!r}: expected a collection of names, such as [{exclude!r}]")
    found: dict[str, None] = {}
    for wanted in exclude:
        inside = [n for n in (*blocks, *reasons) if n == wanted or n.startswith(f"{wanted}.")]
        if not inside:
            joint = next((n for n, block in blocks.items() if wanted in block.members.values()), None)
            reason = (
                "no layer or trainable parameter has that name"
                if joint is None
                else (f"it is part of the block of {joint!r}, which is excluded as a whole or not at all")
            )
            raise ValueError(f"exclude: {wanted!r}: {reason}; there are {[*blocks, *reasons]}")
        found |= dict.fromkeys(inside)
    return list(found)


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _is_own(module: nn.Module) -> bool:
    """Whether a module is of a class that somebody wrote, not one of torch's or of a known kind."""
    if known_kind(module) or refused(module) is not None:
        return False
    return not type(module).__module__.startswith("torch.") or isinstance(module, nn.ParameterList | nn.ParameterDict)


def _members(block: Block) -> tuple[str | None, ...]:
    if block.rule.attributes == ("weight", "bias"):
        return block.members.get("weight"), block.members.get("bias")
    return tuple(block.members.values())
