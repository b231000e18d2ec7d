"""Independent binary outputs with logits z: binary cross-entropy."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.likelihoods.base import Normalised, diagonal_factor, own_weight, trailing_weight

# Factors of a product whose logarithm is taken once: 2^-64 is far from what single precision cannot hold.
_FACTORS = 64


class Bernoulli(Normalised):
    r"""``p(y = 1 | z) = σ(z)``: binary cross-entropy with logits; ``F_R = diag(σ(z) (1 − σ(z)))`` [NATGRAD, eq. 11].

    Targets may be soft, in [0, 1].

    Args:
        normalizer: ``"example"``, ``"element"`` or ``"none"``.
        pos_weight: multiplies the term of y = 1, broadcast to the trailing dimensions of z. The curvature then depends
            on y: it is multiplied by ``1 + (pos_weight − 1) y``.
        weight: multiplies every target's nll, broadcast to the trailing dimensions of z; does not change the count.

    Raises:
        TypeError: a weight is no tensor.
        ValueError: a weight is negative, or an unknown normaliser.
    """

    def __init__(
        self, normalizer: str = "example", *, pos_weight: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        super().__init__(normalizer)
        self.pos_weight = own_weight("pos_weight", pos_weight)
        self.weight = own_weight("weight", weight)

    def __repr__(self) -> str:
        return f"Bernoulli(normalizer={self.normalizer!r})"

    @property
    def needs_targets(self) -> bool:
        """True with ``pos_weight``."""
        return self.pos_weight is not None

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """``−pos_weight y log σ(z) − (1 − y) log σ(−z)``, times weight, per output."""
        return nn.functional.binary_cross_entropy_with_logits(
            z,
            y.to(z.dtype),
            weight=trailing_weight("weight", self.weight, z),
            pos_weight=trailing_weight("pos_weight", self.pos_weight, z),
            reduction="none",
        )

    def nll_and_score(self, z: Tensor, y: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, "batch ..."]]:
        """``Σ losses`` and ``σ(z) − y``, without a graph; one exponential per output serves both.

        ``losses = max(z, 0) − y z − log max(σ(z), σ(−z))``; the logarithm is taken of products of 64 numbers in [½, 1].
        """
        if self.weight is not None or self.pos_weight is not None:
            return super().nll_and_score(z, y)
        self.check(z, y)
        z, y = z.detach(), y.to(z.dtype)
        derivative = torch.sigmoid(z)
        larger = (1 - derivative).to(torch.promote_types(z.dtype, torch.float32)).flatten()
        torch.maximum(larger, derivative.flatten(), out=larger)
        derivative -= y
        whole = larger.numel() // _FACTORS * _FACTORS
        log = larger[:whole].view(-1, _FACTORS).prod(1).log().sum() + larger[whole:].log().sum()
        del larger  # as large as z: let go of before the next one is made
        linear = torch.relu(z).addcmul_(z, y, value=-1).sum(dtype=log.dtype)
        return linear - log, derivative

    def curvature_weight(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor | None:
        """The weights, times ``1 + (pos_weight − 1) y``; None for ones.

        Raises:
            ValueError: there is a ``pos_weight`` and y is not given.
        """
        total = super().curvature_weight(z, y, weight)
        own = trailing_weight("weight", self.weight, z)
        if own is not None:
            total = own.expand_as(z) if total is None else total * own
        of_positives = trailing_weight("pos_weight", self.pos_weight, z)
        if of_positives is not None:
            if y is None:
                raise ValueError("Bernoulli(pos_weight=...): the curvature depends on the targets; pass y=")
            self.check(z, y)
            positive = 1 + (of_positives - 1) * y.to(z.dtype)
            total = positive if total is None else total * positive
        return total

    def accepts(self, dtype: torch.dtype) -> bool:
        """Floating point and bool."""
        return dtype.is_floating_point or dtype == torch.bool

    def validate(self, z: Tensor, y: Tensor) -> None:
        """Targets are in [0, 1] (NaN is left to the optimisers, which skip such a batch)."""
        super().validate(z, y)
        if y.dtype != torch.bool and bool(((y < 0) | (y > 1)).any()):
            raise ValueError(
                f"targets: Bernoulli expects values in [0, 1]; got {y.min().item():g} to {y.max().item():g} "
                "(scale images to [0, 1], or use Gaussian for real values)"
            )

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """0 or 1 for every output, in z's dtype."""
        uniform = torch.empty_like(z).uniform_(generator=generator)  # torch.bernoulli would raise on a NaN batch
        return (uniform < torch.sigmoid(z.detach())).to(z.dtype)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """``σ(z) − y``."""
        return torch.sigmoid(z) - y.to(z.dtype)

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        """``σ(z) (1 − σ(z)) v``."""
        return self.fisher_diagonal(z) * v

    def fisher_diagonal(self, z: Tensor) -> Tensor:
        """``σ(z) (1 − σ(z))``."""
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def fisher_factor(self, z: Tensor) -> Tensor:
        """``diag(√(σ(z) (1 − σ(z))))``, ``[*z.shape, k]``."""
        return diagonal_factor(self.fisher_diagonal(z))

    def to_mean(self, z: Tensor) -> Tensor:
        """``σ(z)``."""
        return torch.sigmoid(z)

    def mean_fisher_product(self, p: Tensor, v: Tensor) -> Tensor:
        """The Fisher of the output probabilities: ``v / (p (1 − p))``."""
        return v / (p * (1 - p))
