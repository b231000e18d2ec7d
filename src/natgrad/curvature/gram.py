"""A sum of outer products that is kept as its rows until somebody needs the matrix.

The factors of a few rows are as large as those of many: written out, those of one batch take as much memory as the
averages that they go into, and several passes over it. Kept as rows they are multiplied out once, into the average.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.layers.factors import input_moment


@dataclass(frozen=True)
class Gram:
    """``scale Σ x̄ x̄ᵀ`` over rows x, with ``x̄ = [x 1]`` where there is a bias.

    Args:
        rows: x.
        bias: whether the homogeneous 1 belongs to it, as the last coordinate.
        scale: a non-negative number.
    """

    rows: Float[Tensor, "rows d"]
    bias: bool = False
    scale: float | Tensor = 1.0

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        size = self.rows.shape[1] + self.bias
        return torch.Size((size, size))

    def __add__(self, other: "Gram") -> "Gram | Tensor":
        """The sum over both sets of rows; a matrix where these are more than columns, or of different scales."""
        scales = self.scale, other.scale
        alike = not any(isinstance(scale, Tensor) for scale in scales) and scales[0] == scales[1]
        if alike and self.bias == other.bias and len(self.rows) + len(other.rows) <= self.shape[0]:
            return replace(self, rows=torch.cat([self.rows, other.rows]))
        return self.to_dense() + other.to_dense()

    def __mul__(self, factor: float | Tensor) -> "Gram":
        """The matrix times a number."""
        return replace(self, scale=self.scale * factor)

    def to_dense(self) -> Float[Tensor, "columns columns"]:
        """The matrix."""
        return input_moment(self.rows, bias=self.bias).mul_(self.scale)

    def trace(self) -> Float[Tensor, ""]:
        """Its trace, in float64; it bounds every entry, so that none is infinite or NaN where it is finite."""
        ones = float(self.rows.shape[0] * self.bias)
        return (self.rows.square().sum().double() + ones) * self.scale

    def average_into(
        self, average: Float[Tensor, "columns columns"], weight: Float[Tensor, ""], usable: Bool[Tensor, ""]
    ) -> None:
        """``average ← (1 − weight) average + weight · self`` in place, or nothing where it is not usable.

        On the CPU in one pass over the average, and without a matrix beside it. Elsewhere reading the weight would wait
        for the device: there the matrix is written out.
        """
        if average.device.type != "cpu":
            matrix = torch.where(usable, self.to_dense().to(average.dtype), average)
            average.lerp_(matrix, weight.to(average.dtype))
            return
        if not usable:
            return
        keep, share = 1 - float(weight), float(weight * self.scale)
        x, d = self.rows.to(average.dtype), self.rows.shape[1]
        average[:d, :d].addmm_(x.T, x, beta=keep, alpha=share)
        if self.bias:
            average[d, :d].mul_(keep).add_(x.sum(0), alpha=share)
            average[:d, d] = average[d, :d]
            average[d, d].mul_(keep).add_(share * len(x))
