"""h(θ) = nll + η/2 ‖θ‖² around the present parameters, for steps that look at it again and again."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.optim.newton import CurvatureName, NewtonModel, Part

Curvature = Literal["gauss_newton", "metric"]


class Objective:
    """h on some micro-batches: the same function at every evaluation, dropout masks and buffers included.

    Args:
        newton: the model.
        parts: the micro-batches.
        l2: η.
    """

    def __init__(self, newton: NewtonModel, parts: Sequence[Part], l2: float = 0.0) -> None:
        self.newton, self.parts, self.l2 = newton, list(parts), l2
        parameters = newton.view.parameters.values()
        self._theta = torch.cat([p.detach().reshape(-1) for p in parameters]) if l2 else None

    def at(self, offset: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """h(θ + offset), in float64."""
        return self.newton.loss_at(offset, self.parts) + self.penalty(offset)

    def gradient_at(self, offset: Float[Tensor, " P"]) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """h and ∇h at θ + offset."""
        loss, gradient = self.newton.gradient_at(offset, self.parts)
        if self._theta is not None:
            gradient = gradient.add_(self._theta + offset, alpha=self.l2)
        return loss + self.penalty(offset), gradient

    def penalty(self, offset: Float[Tensor, " P"] | None = None) -> Float[Tensor, ""] | float:
        """``η/2 ‖θ + offset‖²``."""
        if self._theta is None:
            return 0.0
        moved = self._theta if offset is None else self._theta + offset
        return 0.5 * self.l2 * moved.square().sum().double()

    def add_penalty_(self, gradient: Float[Tensor, " P"]) -> None:
        """``+ η θ``, in place."""
        if self._theta is not None:
            gradient.add_(self._theta, alpha=self.l2)


def curvature_name(word: str) -> CurvatureName:
    """What the library calls the matrix that an argument ``curvature`` names.

    Raises:
        ValueError: unknown word.
    """
    if word not in get_args(Curvature):
        raise ValueError(f"curvature={word!r}: expected one of {', '.join(map(repr, get_args(Curvature)))}")
    return "fisher" if word == "metric" else "gauss_newton"
