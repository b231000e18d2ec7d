"""Right-hand sides whose squares the precision of their numbers cannot hold: solved for a multiple of them.

Single precision has no squares of numbers below about 1e-19 or above 1e19. The solution of ``A x = b`` is linear in b,
and a multiple by a power of two is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.linalg.krylov import Progress, Solution, StoppingRule, System

_LARGEST_STEP = 64


def least_square(dtype: torch.dtype) -> float:
    """Squares and products below this have lost digits, or all of them."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def solve_rescaled(
    system: System, rules: Sequence[StoppingRule], solve: Callable[[System, Sequence[StoppingRule]], Solution]
) -> Solution:
    """The solution for b from that for ``2^k b`` with elements of about 1.

    Args:
        system: ``A x = b``.
        rules: they see the numbers of the system as it stands.
        solve: the solver, which takes zeros for zeros.
    """
    largest = float(system.b.abs().max()) if system.b.numel() else 0.0
    if not 0 < largest < math.inf:
        return solve(system, rules)
    exponent = math.frexp(largest)[1]
    found = solve(
        system.with_start(
            times_power(system.b, -exponent), None if system.x0 is None else times_power(system.x0, -exponent)
        ),
        [_Rescaled(rule, exponent) for rule in rules],
    )

    def back(v: Any) -> Any:
        return {key: back(part) for key, part in v.items()} if isinstance(v, dict) else times_power(v, exponent)

    return replace(
        found,
        x=back(found.x),
        residual=back(found.residual),
        residual_norm=back(found.residual_norm),
        rhs_norm=back(found.rhs_norm),
        model_values=tuple(_wide(value, 2 * exponent) for value in found.model_values),
        iterates={i: back(v) for i, v in found.iterates.items()},
    )


def times_power(v: Any, exponent: int) -> Any:
    """``2^exponent v`` of a tensor or a number, in steps, for the power itself may be out of range."""
    while exponent:
        step = max(-_LARGEST_STEP, min(exponent, _LARGEST_STEP))
        v, exponent = v * 2.0**step, exponent - step
    return v


@dataclass(frozen=True)
class _Rescaled:
    """A rule that sees the numbers of the system before it was multiplied by ``2^-exponent``."""

    rule: StoppingRule
    exponent: int

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def needs_model(self) -> bool:
        return self.rule.needs_model

    def __call__(self, progress: Progress) -> Tensor | bool:
        values = [_wide(value, 2 * self.exponent) for value in progress.model_values] if self.needs_model else ()
        residual_norm, rhs_norm = _wide(progress.residual_norm, self.exponent), _wide(progress.rhs_norm, self.exponent)
        return self.rule(Progress(progress.iteration, residual_norm, rhs_norm, values))


def _wide(value: Tensor | float, exponent: int) -> Any:
    """``2^exponent value`` in double precision, where the device has it."""
    if isinstance(value, Tensor) and value.device.type != "mps":
        value = value.double()
    return times_power(value, exponent)
