"""Counts with log-rate z."""

import torch
from torch import Tensor

from natgrad.likelihoods.base import Normalised, diagonal_factor


class Poisson(Normalised):
    """``y ~ Poisson(exp(z))``: ``nll = exp(z) − y z``, constants dropped; ``F_R = diag(exp(z))``.

    Args:
        normalizer: ``"example"``, ``"element"`` or ``"none"``.
    """

    def __repr__(self) -> str:
        return f"Poisson(normalizer={self.normalizer!r})"

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """``exp(z) − y z``, per output."""
        return z.exp() - y * z

    def accepts(self, dtype: torch.dtype) -> bool:
        """Floating point and integers."""
        return not dtype.is_complex and dtype != torch.bool

    def validate(self, z: Tensor, y: Tensor) -> None:
        """Counts are not negative."""
        super().validate(z, y)
        if bool((y < 0).any()):
            raise ValueError(f"targets: Poisson expects counts of at least 0; got {y.min().item():g}")

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts, in z's dtype."""
        return torch.poisson(z.detach().exp().nan_to_num(nan=0.0), generator=generator)  # a NaN batch must not raise

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """``exp(z) − y``."""
        return z.exp() - y

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        """``exp(z) v``."""
        return z.exp() * v

    def fisher_diagonal(self, z: Tensor) -> Tensor:
        """``exp(z)``."""
        return z.exp()

    def fisher_factor(self, z: Tensor) -> Tensor:
        """``diag(exp(z/2))``, ``[*z.shape, k]``."""
        return diagonal_factor(self.fisher_diagonal(z))

    def to_mean(self, z: Tensor) -> Tensor:
        """The rate ``exp(z)``."""
        return z.exp()

    def mean_fisher_product(self, p: Tensor, v: Tensor) -> Tensor:
        """The Fisher of the rate: ``v / p``."""
        return v / p
