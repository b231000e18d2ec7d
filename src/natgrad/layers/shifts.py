r"""``Σ p pᵀ`` over the patches of a convolution, with each product of two lines of the input taken once.

A patch holds the lines ``h + d k`` of the padded input, k being its taps along the first dimension of the kernel, d the
dilation. Where the patches follow each other line by line, the blocks of two pairs of taps (k, k + δ) are sums of
``u_l u_{l + dδ}ᵀ``, u being what the rest of the kernel sees of a line, over two ranges of l that differ at their ends
alone: the products of the lines in common serve all pairs of one δ. For a 3 x 3 kernel that is less than two thirds of
the multiplications, and a third of the memory that patches take.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Lines(NamedTuple):
    """A padded input, line by line.

    Args:
        view: ``[groups, channels, *rest of the kernel, lines, N, *rest of the positions]``, a view.
        taps: of the kernel along the lines.
        dilation: how many lines are between two taps.
        rest: how many dimensions the rest of the kernel has.
    """

    view: Tensor
    taps: int
    dilation: int
    rest: int

    @property
    def positions(self) -> int:
        """How many positions a patch has along the lines."""
        return self.view.shape[2 + self.rest] - self.dilation * (self.taps - 1)


def lines_of(patches: Float[Tensor, "N C ..."], groups: int) -> Lines | None:
    """The lines of a view of patches, where products of lines can be shared.

    Args:
        patches: ``[N, C, *kernel, *positions]``, see :func:`natgrad.layers.patches.patch_view`.
        groups: of channels.
    """
    spatial = (patches.ndim - 2) // 2
    taps, positions = patches.shape[2], patches.shape[2 + spatial]
    step, stride = patches.stride(2), patches.stride(2 + spatial)
    if taps < 2 or stride == 0 or step % stride or positions <= step // stride * (taps - 1):
        return None
    dilation = step // stride
    view = patches.select(2, 0)  # N, C, rest of the kernel, positions
    sizes, strides = list(view.shape), list(view.stride())
    sizes[1 + spatial] = positions + dilation * (taps - 1)
    view = view.as_strided(sizes, strides, patches.storage_offset())
    view = view.unflatten(1, (groups, -1)).movedim((1 + 1 + spatial, 0), (1 + spatial, 2 + spatial))
    return Lines(view, taps, dilation, spatial - 1)


def parts_of(lines: Lines, limit: int) -> Iterator[Float[Tensor, "groups features lines rows"]]:
    """Copies of some examples and lines after the other, of no more elements than asked for where that is possible.

    Neighbouring parts overlap in the lines that two taps see: every part is summed for itself.
    """
    view, at = lines.view, 2 + lines.rest  # the dimension of lines
    features, overlap = view.shape[1:at].numel(), lines.dilation * (lines.taps - 1)
    per_line = view.shape[0] * features * view.shape[at + 2 :].numel()
    examples = max(1, limit // (per_line * view.shape[at]))
    most = max(2 * overlap + 1, limit // per_line) if examples == 1 else view.shape[at]
    for some in view.split(examples, dim=at + 1):
        first = 0
        while first + overlap < view.shape[at]:
            last = min(first + most, view.shape[at])
            if view.shape[at] - last < overlap + 1:  # too few positions for a part of their own
                last = view.shape[at]
            block = some.narrow(at, first, last - first)
            yield block.reshape(view.shape[0], features, last - first, -1)
            first = last - overlap


def add_moment(u: Float[Tensor, "groups features lines rows"], lines: Lines, total: Tensor) -> None:
    """Add ``Σ p pᵀ`` of one part.

    Args:
        u: the part.
        lines: what it is of.
        total: ``[taps, taps, groups, features, features]``; of two pairs of different taps that with the smaller one
            first is added to.
    """
    taps, dilation = lines.taps, lines.dilation
    positions = u.shape[2] - dilation * (taps - 1)
    for apart in range(taps):
        shift = dilation * apart

        def product(first: int, last: int, shift: int = shift) -> Tensor:
            """``Σ u_l u_{l + shift}ᵀ`` over some lines."""
            return u[:, :, first:last].flatten(2) @ u[:, :, first + shift : last + shift].flatten(2).mT

        pairs, reach = taps - apart, dilation * (taps - 1 - apart)
        common = product(reach, positions) if reach < positions else 0
        before = [product(dilation * k, dilation * (k + 1)) for k in range(pairs - 1)]
        behind = [product(positions + dilation * k, positions + dilation * (k + 1)) for k in range(pairs - 1)]
        for k in range(pairs):
            block = total[k, k + apart]
            block += common
            for part in (*before[k:], *behind[:k]):
                block += part


def add_sums(u: Float[Tensor, "groups features lines rows"], lines: Lines, total: Tensor) -> None:
    """Add ``Σ p`` of one part to ``[taps, groups, features]``."""
    positions = u.shape[2] - lines.dilation * (lines.taps - 1)
    by_line = u.sum(3)
    for k in range(lines.taps):
        total[k] += by_line.narrow(2, lines.dilation * k, positions).sum(2)


def moments_of(
    lines: Lines, limit: int, bias: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "groups features"], Float[Tensor, "groups features features"]]:
    """``Σ p`` (zeros where no bias asks for it) and ``Σ p pᵀ``, features in the order of a flattened weight.

    Args:
        lines: of the padded input.
        limit: elements of copies of it that exist at one time, where that is possible.
        bias: whether ``Σ p`` is wanted.
        dtype: of the sums.
    """
    taps, groups, features = lines.taps, lines.view.shape[0], lines.view.shape[1 : 2 + lines.rest].numel()
    sums = lines.view.new_zeros(taps, groups, features, dtype=dtype)
    total = lines.view.new_zeros(taps, taps, groups, features, features, dtype=dtype)
    for part in parts_of(lines, limit):
        u = part.to(dtype)
        add_moment(u, lines, total)
        if bias:
            add_sums(u, lines, sums)
    for k in range(taps):
        for other in range(k):
            total[k, other] = total[other, k].mT
    channels = lines.view.shape[1]  # features are channels times the taps of the rest of the kernel
    total = total.view(taps, taps, groups, channels, -1, channels, features // channels)
    total = total.permute(2, 3, 0, 4, 5, 1, 6).reshape(groups, taps * features, -1)
    return sums.view(taps, groups, channels, -1).permute(1, 2, 0, 3).reshape(groups, -1), total
