"""From what a user hands to ``step`` to a list of (inputs, targets) micro-batches."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.model_view import batch_size, select_rows, tensor_leaves
from natgrad.optim.arguments import check_whole


def micro_batches(inputs: Any, targets: Any, size: int | None) -> list[tuple[Any, Any]]:
    """The micro-batches of one batch.

    Args:
        inputs: one batch; or, with ``targets=None``, an iterable of (inputs, targets) pairs.
        targets: the targets of the batch.
        size: at most this many examples in a micro-batch; None leaves the batches as they are.

    Raises:
        ValueError: no data, lengths that differ, or a size below 1.
        TypeError: inputs that are neither a batch nor an iterable of pairs; a size that is no whole number.
    """
    check_whole(micro_batch_size=size)
    if size is not None and size < 1:
        raise ValueError(f"micro_batch_size={size}: expected a positive number of examples, or None")
    if targets is None:
        if isinstance(inputs, Tensor | Mapping) or not isinstance(inputs, Iterable):
            raise TypeError(
                f"targets is missing and inputs is a {type(inputs).__name__}: expected step(inputs, targets), or an "
                "iterable of (inputs, targets) micro-batches"
            )
        pairs = list(inputs)
        for pair in pairs:
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise TypeError(
                    "inputs: with targets=None each element must be a pair (inputs, targets); got "
                    f"{type(pair).__name__}"
                )
        batches = [(pair[0], pair[1]) for pair in pairs]
    else:
        batches = [(inputs, targets)]
    if not batches:
        raise ValueError("inputs: the batch is empty; expected at least one (inputs, targets) micro-batch")
    split: list[tuple[Any, Any]] = []
    for x, y in batches:
        rows, answers = batch_size(x), batch_size(y, "targets")
        if answers != rows:
            raise ValueError(f"targets: {answers} examples for {rows} inputs; expected one target for each example")
        if size is None or rows <= size:
            split.append((x, y))
        else:
            pieces = range(0, rows, size)
            split.extend((select_rows(x, slice(i, i + size)), select_rows(y, slice(i, i + size))) for i in pieces)
    return split


def share_of(
    batches: Sequence[tuple[Any, Any]], share: float, generator: torch.Generator
) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """Some examples of every micro-batch, chosen at random, and the others.

    Args:
        batches: (inputs, targets) micro-batches.
        share: of the examples of each, at least one.
        generator: the source of the choice; not used where the share is 1.
    """
    if share == 1:
        return list(batches), []
    chosen, others = [], []
    for x, y in batches:
        size = batch_size(x)
        order = torch.randperm(size, generator=generator, device=generator.device)
        cut = min(size, max(1, round(share * size)))
        for part, into in ((order[:cut], chosen), (order[cut:], others)):
            if len(part):
                rows = part.sort().values
                into.append((select_rows(x, rows), select_rows(y, rows)))
    return chosen, others


def other_batch(name: str, pair: Any, inputs: Any, size: int | None) -> list[tuple[Any, Any]]:
    """The micro-batches of a batch beside that of the gradient.

    Args:
        name: of the argument.
        pair: (inputs, targets), whatever the caller gave.
        inputs: those of the gradient's batch, or one of its micro-batches.
        size: at most this many examples in a micro-batch.

    Raises:
        TypeError: no pair.
        ValueError: inputs of another form, or lengths that differ.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[1] is None:
        raise TypeError(f"{name}: expected a pair (inputs, targets), got {type(pair).__name__}")
    try:
        found = micro_batches(pair[0], pair[1], size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    check_same_form(name, pair[0], inputs)
    return found


def check_same_form(name: str, given: Any, inputs: Any) -> None:
    """Refuses inputs whose examples are not like those of the batch.

    Args:
        name: of the argument.
        given: its value.
        inputs: of the batch.

    Raises:
        ValueError: another number of tensors, another dtype, examples of another shape, or a dict of other keys.
    """
    keys, wanted = _keys(given), _keys(inputs)
    if keys != wanted:
        raise ValueError(f"{name}: {_what(keys)}; expected what inputs are, {_what(wanted)}")
    found, expected = _forms(given), _forms(inputs)
    if [form[1:] for form in found] != [form[1:] for form in expected]:
        raise ValueError(f"{name}: {_described(found)}; expected what inputs have, {_described(expected)}")


def _keys(inputs: Any) -> list[str] | None:
    return sorted(map(str, inputs)) if isinstance(inputs, Mapping) else None


def _what(keys: list[str] | None) -> str:
    return "no dict" if keys is None else f"a dict of {', '.join(map(repr, keys))}"


def _forms(inputs: Any) -> list[tuple[int, torch.dtype, torch.Size]]:
    """Examples, dtype and shape of an example, of every tensor."""
    return [(len(leaf) if leaf.ndim else 0, leaf.dtype, leaf.shape[1:]) for leaf in tensor_leaves(inputs)]


def _described(forms: list[tuple[int, torch.dtype, torch.Size]]) -> str:
    return " and ".join(f"{[rows, *shape]} {dtype}" for rows, dtype, shape in forms) or "no tensor"
