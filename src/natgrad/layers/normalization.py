"""Layers that normalise and then scale and shift: the diagonal of the curvature in scale and shift."""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from natgrad.layers.rules import Block, DiagonalRule, Use


class AffineRule(DiagonalRule):
    """``s = weight ⊙ x̂ + bias`` with the normalised input x̂; an example's gradient is ``Σ g ⊙ x̂`` and ``Σ g``."""

    @abstractmethod
    def normalized(self, use: Use) -> Float[Tensor, "examples ..."]:
        """x̂, shaped like the input."""

    @abstractmethod
    def summed(self, use: Use, x: Tensor) -> Float[Tensor, "examples columns"]:
        """The sum over positions of something shaped like the output, flattened like the parameters."""

    def per_example(self, block: Block, use: Use, g: Tensor) -> Float[Tensor, "examples columns"]:
        """``[Σ g ⊙ x̂, Σ g]``."""
        g = use.gradient(g).to(block.dtype)
        parts = []
        for name in block.members:
            scaled = g * self.normalized(use).to(block.dtype) if name == "weight" else g
            parts.append(self.summed(use, scaled))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class LastDimensionsRule(AffineRule):
    """``nn.LayerNorm`` and ``nn.RMSNorm``, which scale the last dimensions."""

    features_last = True

    def normalized(self, use: Use) -> Float[Tensor, "examples ..."]:
        """x̂."""
        layer = use.layer
        if isinstance(layer, torch.nn.RMSNorm):
            return F.rms_norm(use.input, layer.normalized_shape, None, layer.eps)
        return F.layer_norm(use.input, layer.normalized_shape, None, None, layer.eps)

    def summed(self, use: Use, x: Tensor) -> Float[Tensor, "examples columns"]:
        """Over the dimensions between the examples and the normalised ones."""
        size = torch.Size(use.layer.normalized_shape).numel()
        if x.ndim == len(use.layer.normalized_shape):
            return x.reshape(1, size)
        return x.reshape(x.shape[0], -1, size).sum(1)


class ChannelsRule(AffineRule):
    """``nn.GroupNorm``, ``nn.BatchNorm*d`` and ``nn.InstanceNorm*d``, which scale the channels in dimension 1."""

    def normalized(self, use: Use) -> Float[Tensor, "examples ..."]:
        """x̂: of the batch, of the running statistics or of the example, as the layer did it."""
        layer, x = use.layer, use.input
        if isinstance(layer, torch.nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, None, None, layer.eps)
        running = None, None
        if not use.training or layer.running_mean is None:
            running = layer.running_mean, layer.running_var
        own = running[0] is None  # statistics of the input itself
        if isinstance(layer, torch.nn.modules.instancenorm._InstanceNorm):
            flat = x if x.ndim == layer._get_no_batch_dim() + 1 else x[None]
            return F.instance_norm(flat, *running, None, None, own, 0.0, layer.eps).reshape(x.shape)
        batch = x if use.whole is None or not own else use.whole
        return F.batch_norm(batch, *running, None, None, own, 0.0, layer.eps)[: len(x)]

    def summed(self, use: Use, x: Tensor) -> Float[Tensor, "examples columns"]:
        """Over the positions behind the channels."""
        if isinstance(use.layer, torch.nn.modules.instancenorm._InstanceNorm):
            x = x if x.ndim == use.layer._get_no_batch_dim() + 1 else x[None]
        return x.flatten(2).sum(2) if x.ndim > 2 else x

    def refuse(self, layer: Any) -> str | None:
        """Statistics over several ranks."""
        return "whose statistics are those of several ranks" if isinstance(layer, torch.nn.SyncBatchNorm) else None
