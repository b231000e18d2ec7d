"""Steps that evaluate the model themselves do so in the model's own precision, inside ``torch.autocast`` too."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(step: Callable[P, R]) -> Callable[P, R]:
    """A method of an optimiser with a ``view``, with autocast switched off.

    Curvature, its inverses and reduction ratios are differences of numbers that are nearly the same: in half precision
    they would be rounding. (``natgrad.Preconditioner`` leaves forward and backward passes to a loop under autocast.)
    """

    @functools.wraps(step)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        with torch.autocast(optimizer.view.device.type, enabled=False):
            return step(*args, **kwargs)

    return wrapped
