"""The normal distribution around z: squared error."""

import torch
from torch import Tensor

from natgrad.likelihoods.base import Normalised, diagonal_factor


class Gaussian(Normalised):
    r"""``y ~ N(z, variance · I)``: squared error.

    ``nll = ½ ‖y − z‖² / variance``, constants dropped; ``F_R = I / variance`` [NATGRAD, eq. 9].

    Args:
        variance: of every output.
        normalizer: ``"example"``, ``"element"`` or ``"none"``.

    Raises:
        ValueError: a variance that is not positive, or an unknown normaliser.
    """

    def __init__(self, variance: float = 1.0, normalizer: str = "example") -> None:
        super().__init__(normalizer)
        if not variance > 0:
            raise ValueError(f"Gaussian(variance={variance}): expected a positive number")
        self.variance = variance

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance}, normalizer={self.normalizer!r})"

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """``½ (y − z)² / variance``, per output."""
        return (z - y).square() * (0.5 / self.variance)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``z + √variance · noise``."""
        noise = torch.empty_like(z).normal_(generator=generator)
        return z.detach() + self.variance**0.5 * noise

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """``(z − y) / variance``."""
        return (z - y) / self.variance

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        """``v / variance``."""
        return v / self.variance

    def fisher_diagonal(self, z: Tensor) -> Tensor:
        """``1 / variance``, shaped like z."""
        return torch.full_like(z, 1 / self.variance)

    def fisher_factor(self, z: Tensor) -> Tensor:
        """``I / √variance``, ``[*z.shape, k]`` with k the number of outputs of an example."""
        return diagonal_factor(self.fisher_diagonal(z))

    def to_mean(self, z: Tensor) -> Tensor:
        """z itself."""
        return z

    def mean_fisher_product(self, p: Tensor, v: Tensor) -> Tensor:
        """The Fisher of the mean: ``v / variance``."""
        return v / self.variance
