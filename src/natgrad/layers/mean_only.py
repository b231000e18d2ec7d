"""Mean-only batch normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MeanOnlyBatchNorm(nn.Module):
    r"""``t − μ + b`` with μ the mean of t over the minibatch, per feature: no division by a deviation.

    T. Salimans, D. Kingma, "Weight normalization", 2016, sec. 4; compared with centred gradient descent in
    [THESIS, secs. 6.4.1, 6.6.1]. Put it behind a linear layer without a bias. In evaluation mode μ is a running mean,
    as in ``nn.BatchNorm1d``.

    Args:
        features: the size of the feature dimension.
        momentum: share of a new minibatch in the running mean.
        dim: which dimension holds the features: 1 as in ``nn.BatchNorm1d``, -1 for sequences of feature vectors.

    Raises:
        ValueError: a size below 1, a momentum outside [0, 1], or at the call an input of another size.
    """

    running_mean: Float[Tensor, " features"]
    num_batches_tracked: Tensor

    def __init__(self, features: int, momentum: float = 0.1, dim: int = 1) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features}: expected a positive number")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: expected a number in [0, 1], such as 0.1")
        self.features, self.momentum, self.dim = features, momentum, dim
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, t: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """``t − μ + b``; in training mode the running mean takes μ in."""
        if t.ndim < 2 or t.shape[self.dim] != self.features:
            raise ValueError(
                f"MeanOnlyBatchNorm: expected {self.features} features in dimension {self.dim}, got a tensor of shape "
                f"{tuple(t.shape)}"
            )
        mean = self.running_mean
        if self.training:
            others = [i for i in range(t.ndim) if i != self.dim % t.ndim]
            mean = t.mean(others)
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
                self.num_batches_tracked += 1
        shape = [1] * t.ndim
        shape[self.dim] = self.features
        return t + (self.bias - mean).reshape(shape)

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"{self.features}, momentum={self.momentum}, dim={self.dim}"
