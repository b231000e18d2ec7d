"""Factors averaged over the updates: ``Ā ← ε Ā + (1 − ε) A`` with ``ε = min(1 − 1/k, decay)`` [KFAC, sec. 5]."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from natgrad.curvature.base import Diagonal, Factors, entries, to_dense
from natgrad.curvature.gram import Gram
from natgrad.curvature.pairs import is_pair


class RunningFactors:
    """The decayed average of every layer's factors; k counts the estimates that went in.

    An estimate that holds NaN or infinite values changes nothing. One that lacks a layer leaves its average; the first
    one of a layer is its average.

    Args:
        decay: the cap on ε.

    Raises:
        ValueError: decay is outside [0, 1).
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: expected 0 <= decay < 1, such as 0.95")
        self.decay = decay
        self.factors: dict[str, Factors] = {}
        self.updates: Tensor | None = None

    @property
    def weight(self) -> Float[Tensor, ""]:
        """``1 − ε`` of the last estimate that went in."""
        if self.updates is None:
            raise RuntimeError("no estimate has gone in yet")
        return torch.clamp(1 / self.updates.clamp(min=1), min=1 - self.decay)

    def update(self, estimate: Mapping[str, Factors], usable: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Take in one estimate.

        Args:
            estimate: factors by layer name.
            usable: False leaves the averages as they are.

        Returns:
            whether it went in: usable and finite.
        """
        sizes = [_size(factor) for factors in estimate.values() for factor in (factors.A, factors.G)]
        usable = usable & torch.isfinite(torch.stack(sizes).sum())
        if self.updates is None:
            self.updates = torch.zeros((), dtype=torch.float64, device=usable.device)
            self.factors = {name: _nothing(factors) for name, factors in estimate.items()}
        self.updates = self.updates + usable
        if usable.device.type == "cpu" and not usable:  # reading it costs nothing there, a select over matrices does
            return usable
        weight = self.weight
        averages: list[Tensor] = []
        estimates: list[Tensor] = []
        weights: list[Tensor] = []
        for name, new in estimate.items():
            own = weight if name in self.factors else torch.ones_like(weight)
            self.factors[name] = old = _alike(self.factors.get(name) or _nothing(new), new)
            for average, factor in ((entries(old.A), new.A), (entries(old.G), new.G)):
                if isinstance(factor, Gram):
                    factor.average_into(average, own, usable)
                else:
                    weights.append(own.to(average.dtype))
                    averages.append(average)
                    estimates.append(entries(factor) if average.ndim == entries(factor).ndim else to_dense(factor))
        if usable.device.type != "cpu":
            estimates = [torch.where(usable, x, average) for x, average in zip(estimates, averages, strict=True)]
        if averages:
            torch._foreach_lerp_(averages, estimates, weights)
        return usable


def mean_eigenvalue(factors: Mapping[str, Factors]) -> Float[Tensor, ""]:
    """``tr F̆ / P``: the mean eigenvalue of the block-diagonal approximation over all layers."""
    traces, size = [], 0
    for name, block in factors.items():
        if is_pair(name):
            continue
        A, G = entries(block.A), entries(block.G)
        traces.append((_trace(A).double() * _trace(G).double()).sum())
        size += A[..., 0].numel() * G.shape[-1]
    return torch.stack(traces).sum() / size


def _trace(values: Tensor) -> Tensor:
    return values.sum() if values.ndim == 1 else values.diagonal(dim1=-2, dim2=-1).sum(-1)


def _size(factor: Tensor | Diagonal | Gram) -> Float[Tensor, ""]:
    """A number that is not finite where an entry is not."""
    return factor.trace() if isinstance(factor, Gram) else entries(factor).sum().double()


def _nothing(like: Factors) -> Factors:
    return Factors(_zeros(like.A), _zeros(like.G))


def _zeros(factor: Tensor | Diagonal | Gram) -> Tensor | Diagonal:
    if isinstance(factor, Gram):
        return factor.rows.new_zeros(factor.shape)
    zeros = torch.zeros_like(entries(factor))
    return Diagonal(zeros) if isinstance(factor, Diagonal) else zeros


def _alike(old: Factors, new: Factors) -> Factors:
    """The averages; a diagonal one is written out where the estimate is a full matrix."""
    return Factors(_like(old.A, new.A), _like(old.G, new.G))


def _like(average: Tensor | Diagonal | Gram, new: Tensor | Diagonal | Gram) -> Tensor | Diagonal | Gram:
    return average if isinstance(new, Diagonal) else to_dense(average)
