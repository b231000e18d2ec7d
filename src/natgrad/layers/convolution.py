r"""Convolutions, and transposed ones, with every padding, stride, dilation and number of groups.

A convolution multiplies the patch around every output position by its weight; the positions of an example share it
(Grosse and Martens 2016; Eschenhagen et al. 2023). With groups the block is a stack of one Kronecker product per group,
each of its own channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.layers.factors import joint_moment
from natgrad.layers.patches import (
    add_lower,
    elements_at_once,
    mean_patches,
    mirror,
    pad_like,
    patch_matrices,
    patch_view,
    stuff_zeros,
)
from natgrad.layers.rules import Block, KroneckerRule, Use
from natgrad.layers.shifts import lines_of, moments_of


class ConvolutionRule(KroneckerRule):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``: ``s = W p + b`` for the patch p at every output position.

    V is ``[W b]`` with W flattened to ``[out, in/groups · kernel]``; with groups a stack of them, ``[groups,
    out/groups, columns]``.
    """

    def patches(self, use: Use) -> Float[Tensor, "N C ..."]:
        """``[N, C, *kernel, *positions]``, a view of the padded input."""
        layer = use.layer
        x = pad_like(_batched(use.input, layer), layer._reversed_padding_repeated_twice, layer.padding_mode)
        return patch_view(x, layer.kernel_size, layer.stride, layer.dilation)

    def rows(self, use: Use) -> Float[Tensor, "examples positions in"]:
        """All patches, unfolded; the channels of all groups side by side."""
        patches = self.patches(use)
        spatial = (patches.ndim - 2) // 2
        return self._ordered(use.layer, patches.flatten(2 + spatial).flatten(1, -2), (1,)).transpose(1, 2)

    def gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "examples positions out"]:
        """The derivatives at every output position."""
        return _batched(g, use.layer).flatten(2).transpose(1, 2)

    def stacked_rows(self, use: Use) -> Float[Tensor, "groups examples positions in"]:
        """The patches of every group's channels."""
        return self.rows(use).unflatten(2, (use.layer.groups, -1)).movedim(2, 0)

    def stacked_gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "groups examples positions out"]:
        """The derivatives of every group's channels."""
        return self.gradient_rows(use, g).unflatten(2, (use.layer.groups, -1)).movedim(2, 0)

    def positions(self, use: Use) -> int:
        """Examples times output positions."""
        spatial = len(use.layer.kernel_size)
        examples = use.output_shape[0] if len(use.output_shape) == spatial + 2 else 1
        return examples * use.output_shape[-spatial:].numel()

    def input_sum(self, block: Block, use: Use) -> tuple[Tensor, float | Tensor]:
        """``Σ p̄ p̄ᵀ`` over all patches, a bounded part of them at a time; and their number."""
        weight, bias = "weight" in block.members, "bias" in block.members
        groups, patches = use.layer.groups, self.patches(use)
        if block.sharing == "reduce":
            p = mean_patches(patches, groups).to(block.dtype)
            rows = corner = float(p.shape[1])
            sums, moment = p.sum(1), p.mT @ p
        else:
            rows = corner = float(self.positions(use))
            features = patches.shape[1] // groups * torch.Size(use.layer.kernel_size).numel()
            if not weight:
                sums = patches.new_zeros(groups, features, dtype=block.dtype)
                moment = sums[..., None].expand(groups, features, features)
            else:
                some, times = use.thinned(patches, -1)
                sums, moment = _sums(some, groups, bias, block.dtype)
                if times > 1:  # the number of rows belongs to their sums: the moment stays positive semi-definite
                    corner = rows * some.shape[-1] / patches.shape[-1] * times
                    sums, moment = sums.mul_(times), moment.mul_(times)
        moment, sums = (self._ordered(use.layer, x, dims) for x, dims in ((moment, (1, 2)), (sums, (1,))))
        total = joint_moment(moment, sums, corner, weight, bias)
        return total if groups > 1 else total[0], rows

    def output_sum(self, block: Block, use: Use, g: Tensor, total: Tensor) -> None:
        """Add ``Σ g gᵀ`` over examples and positions, or of their sums over positions."""
        g = _batched(g, use.layer).flatten(2).to(total.dtype)
        groups = use.layer.groups
        if block.sharing == "reduce":
            g = g.sum(2, keepdim=True)
        if groups > 1:
            g = g.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
            total.baddbmm_(g, g.mT)
        elif g.shape[0] == 1:
            total.addmm_(g[0], g[0].T)
        else:  # channels first: their rows side by side, a copy unless the derivatives have the channels last
            g = g.permute(0, 2, 1).reshape(-1, g.shape[1])
            total.addmm_(g.T, g)

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(out, columns), or (groups, out/groups, columns)."""
        columns = ("weight" in names) * layer.weight[0].numel() + ("bias" in names)
        out = layer.out_channels
        return (out, columns) if layer.groups == 1 else (layer.groups, out // layer.groups, columns)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``[W b]``, with groups stacked."""
        V = super().to_matrix(layer, parts)
        return V if layer.groups == 1 else V.unflatten(0, (layer.groups, -1))

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W and b."""
        return super().from_matrix(layer, V if layer.groups == 1 else V.flatten(0, 1), names)

    def refuse(self, layer: Any) -> str | None:
        """Kernels without an element, and nothing else."""
        return "without an element in its weight" if layer.weight.numel() == 0 else None

    def _ordered(self, layer: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Features in the order of the weight along some dimensions."""
        return x


class TransposedConvolutionRule(ConvolutionRule):
    """``nn.ConvTranspose1d``, ``2d``, ``3d``, as a convolution of the input with zeros between its elements.

    Its positions are those of the output. V is as for :class:`ConvolutionRule`.
    """

    def patches(self, use: Use) -> Float[Tensor, "N C ..."]:
        """The patches of the zero-stuffed input; their taps run against those of the weight."""
        layer, x = use.layer, _batched(use.input, use.layer)
        x = stuff_zeros(x, layer.stride)
        amounts: list[int] = []
        spatial = len(layer.kernel_size)
        sizes = zip(
            layer.kernel_size, layer.dilation, layer.padding, use.output_shape[-spatial:], x.shape[2:], strict=True
        )
        for k, d, padding, out, n in reversed(list(sizes)):
            left = d * (k - 1) - padding
            amounts += [left, out + d * (k - 1) - n - left]
        x = pad_like(x, amounts, "zeros")
        return patch_view(x, layer.kernel_size, (1,) * spatial, layer.dilation)

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(out, columns), or (groups, out/groups, columns)."""
        features = layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()
        columns, out = ("weight" in names) * features + ("bias" in names), layer.out_channels // layer.groups
        return (out, columns) if layer.groups == 1 else (layer.groups, out, columns)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``[W b]``, with groups stacked; torch keeps W as ``[in, out/groups, *kernel]``."""
        columns = []
        if "weight" in parts:
            weight = parts["weight"].unflatten(0, (layer.groups, -1)).transpose(1, 2)
            columns.append(weight.flatten(2))
        if "bias" in parts:
            columns.append(parts["bias"].view(layer.groups, -1, 1))
        V = torch.cat(columns, dim=2)
        return V if layer.groups > 1 else V[0]

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W and b; with groups W is a copy."""
        V = V if layer.groups > 1 else V[None]
        parts = {}
        if "weight" in names:
            features = layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()
            weight = V[..., :features].unflatten(2, (-1, *layer.kernel_size)).transpose(1, 2)
            parts["weight"] = weight[0] if layer.groups == 1 else weight.flatten(0, 1)
        return parts | ({"bias": V[..., -1].flatten()} if "bias" in names else {})

    def refuse(self, layer: Any) -> str | None:
        """Other paddings than zeros do not exist here; torch refuses them itself."""
        return "without an element in its weight" if layer.weight.numel() == 0 else None

    def _ordered(self, layer: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        kernel = tuple(layer.kernel_size)
        taps = torch.Size(kernel).numel()
        order = torch.arange(taps, device=x.device).view(kernel).flip(tuple(range(len(kernel)))).flatten()
        for dim in dims:
            channels = x.shape[dim] // taps
            index = (torch.arange(channels, device=x.device)[:, None] * taps + order).flatten()
            x = x.index_select(dim, index)
        return x


def _batched(x: Tensor, layer: Any) -> Tensor:
    """With a dimension of examples."""
    return x if x.ndim == len(layer.kernel_size) + 2 else x[None]


def _sums(patches: Tensor, groups: int, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``Σ p`` (zeros where no bias asks for it) and ``Σ p pᵀ`` per group."""
    lines = lines_of(patches, groups)
    if lines is not None:
        return moments_of(lines, elements_at_once(patches), bias, dtype)
    features = patches.shape[1] // groups * patches.shape[2 : 2 + (patches.ndim - 2) // 2].numel()
    sums = patches.new_zeros(groups, features, dtype=dtype)
    moment = patches.new_zeros(groups, features, features, dtype=dtype)
    for p in patch_matrices(patches, groups):
        p = p.to(dtype)
        add_lower(p, moment)
        if bias:
            sums.add_(p.sum(2))
    return sums, mirror(moment)
