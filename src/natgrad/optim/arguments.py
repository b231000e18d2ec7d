"""Checks of arguments that many optimisers have: the argument, what arrived and what was expected are named."""

import math
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.layers.rules import Block
from natgrad.optim.scaling import KLClip
from natgrad.optim.settings import Periods, Rescaling, StepGuard, Subsets

# Rows of a factor whose decomposition takes minutes.
_WIDEST = 2**14
# Argument → its class or classes, whether None will do, and an example.
_KINDS: dict[str, tuple[tuple[type, ...], bool, str]] = {
    "clip": ((KLClip,), True, "natgrad.KLClip(0.25)"),
    "form": ((ExactTikhonov, FactoredTikhonov), True, "natgrad.ExactTikhonov()"),
    "guard": ((StepGuard,), True, "natgrad.StepGuard()"),
    "periods": ((Periods,), False, "natgrad.Periods(inverses=10)"),
    "rescaling": ((Rescaling,), False, "natgrad.Rescaling()"),
    "subsets": ((Subsets,), False, "natgrad.Subsets(1 / 8, 1 / 4)"),
}


def check_objects(**given: Any) -> None:
    """Refuse settings that are no objects of their class.

    Args:
        given: by the argument's name.

    Raises:
        TypeError: one is something else.
    """
    scaling = given.pop("scaling", None)
    if scaling is not None and not (hasattr(scaling, "measure") and hasattr(scaling, "scales")):
        raise TypeError(f"scaling={scaling!r}: expected natgrad.KLClip(), natgrad.Grafting() or None")
    for name, value in given.items():
        kinds, optional, example = _KINDS[name]
        if not isinstance(value, kinds) and not (optional and value is None):
            none = " or None" if optional else ""
            raise TypeError(f"{name}={value!r}: expected an object such as {example}{none}")


def check_real(**given: Any) -> None:
    """Refuse what is no number.

    Args:
        given: by the argument's name.

    Raises:
        TypeError: with what arrived.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}={value!r}: expected a number")


def check_whole(**given: Any) -> None:
    """Refuse what is no whole number; None is left to the caller.

    Args:
        given: by the argument's name.

    Raises:
        TypeError: with what arrived.
    """
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise TypeError(f"{name}={value!r}: expected a whole number")


def check_number(name: str, value: Any, hint: str = "") -> None:
    """Refuse what is no finite, non-negative number.

    Args:
        name: of the argument.
        value: that arrived.
        hint: more words for the message.

    Raises:
        TypeError: no number.
        ValueError: negative or not finite.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r}: expected a number{hint}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value}: expected a non-negative number{hint}")


def warn_of_size(blocks: Mapping[str, Block], structure: str) -> None:
    """Say that a factor is too wide to be decomposed in any time that training has.

    Args:
        blocks: of the layers.
        structure: of the curvature.
    """
    for name, block in blocks.items():
        of_a, of_g = block.factor_shapes
        widths = [shape[-1] for shape in (of_a, () if structure == "input_covariance" else of_g) if len(shape) > 1]
        if max(widths, default=0) > _WIDEST:
            width = max(widths)
            gigabytes = width**2 * block.dtype.itemsize / 1e9
            warnings.warn(
                f"layer {name!r} has a factor of {width} x {width} numbers, {gigabytes:.1f} GB, which takes minutes or "
                f"more to invert; exclude=[{name!r}] leaves its gradient as it is",
                stacklevel=3,
            )


def seeded(seed: Any, device: torch.device, offset: int = 0) -> torch.Generator:
    """A random stream of its own.

    Args:
        seed: of the stream.
        device: of what is drawn.
        offset: between the streams of processes that have the same seed.

    Raises:
        TypeError: the seed is no whole number.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed={seed!r}: expected a whole number, such as 0") from None
    return torch.Generator(device=device).manual_seed((number + offset) % 2**63)
