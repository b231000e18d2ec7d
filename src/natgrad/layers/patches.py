r"""The patches that a convolution multiplies by its weight, a bounded part of them at a time: pure functions.

Patches are copied once, straight from strided views of the padded input into the layout ``[features, rows]`` in which
``Σ p pᵀ`` is one product of a matrix and its own transposed view: nothing is transposed afterwards, and no column of
ones is appended.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# ``Σ p pᵀ`` is symmetric: of so many blocks of its rows or more only those below the diagonal are multiplied.
_BLOCKS, _ROWS_OF_A_BLOCK = 4, 64
# Elements of the patches that exist at one time.
_ELEMENTS_CPU = 2**20
_ELEMENTS_ACCELERATOR = 2**26


def pad_like(x: Float[Tensor, "N C *space"], amounts: Sequence[int], mode: str) -> Float[Tensor, "N C *padded"]:
    """Padding as the convolutions of torch do it.

    Args:
        x: the input.
        amounts: as for ``torch.nn.functional.pad``: (left, right) of the last dimension first; negative ones crop.
        mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
    """
    if not any(amounts):
        return x
    return F.pad(x, list(amounts), mode="constant" if mode == "zeros" else mode)


def patch_view(
    x: Float[Tensor, "N C *space"], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Float[Tensor, "N C ..."]:
    """``[N, C, *kernel, *positions]``: the patches of a padded input as a view of it.

    Raises:
        ValueError: the kernel does not fit into the input.
    """
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, stride, strict=True)]
    if min(counts) < 1:
        raise ValueError(f"a kernel of {tuple(spans)} does not fit into an input of {tuple(x.shape[2:])}")
    strides = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *kernel, *counts),
        (
            *x.stride()[:2],
            *(d * s for d, s in zip(dilation, strides, strict=True)),
            *(t * s for t, s in zip(stride, strides, strict=True)),
        ),
        x.storage_offset(),
    )


def stuff_zeros(x: Float[Tensor, "N C *space"], stride: Sequence[int]) -> Float[Tensor, "N C *stuffed"]:
    """The input with ``stride − 1`` zeros between neighbours: a transposed convolution is a plain one on it."""
    if all(s == 1 for s in stride):
        return x
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    spread[(..., *(slice(None, None, s) for s in stride))] = x
    return spread


def patch_matrices(patches: Float[Tensor, "N C ..."], groups: int) -> Iterator[Float[Tensor, "groups features rows"]]:
    """The patches of some examples and positions after the other, features being ordered like a flattened weight.

    Args:
        patches: of :func:`patch_view`.
        groups: of channels.
    """
    spatial = (patches.ndim - 2) // 2
    ordered = patches.unflatten(1, (groups, -1)).movedim(0, 2 + spatial)  # groups, channels, kernel, N, positions
    features = ordered[0, ..., 0, *[0] * spatial].numel()
    positions = ordered.shape[3 + spatial :]
    limit = elements_at_once(patches)
    per_row = groups * features * positions[1:].numel()
    per_example = per_row * positions[0]
    examples = max(1, limit // per_example)
    lines = positions[0] if examples > 1 or per_example <= limit else max(1, limit // per_row)
    for part in ordered.split(examples, dim=2 + spatial):
        for block in part.split(lines, dim=3 + spatial):
            yield block.reshape(groups, features, -1)


def elements_at_once(x: Tensor) -> int:
    """How many elements of patches of a tensor may exist at one time."""
    return _ELEMENTS_CPU if x.device.type == "cpu" else _ELEMENTS_ACCELERATOR


def mean_patches(patches: Float[Tensor, "N C ..."], groups: int) -> Float[Tensor, "groups N features"]:
    """The mean patch of every example; nothing is unfolded."""
    spatial = (patches.ndim - 2) // 2
    means = patches.mean(dim=tuple(range(2 + spatial, patches.ndim)))  # N, C, kernel
    return means.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)


def add_lower(p: Float[Tensor, "groups features rows"], total: Float[Tensor, "groups features features"]) -> None:
    """Add ``Σ p pᵀ`` in place, as far as :func:`mirror` needs it: blocks of rows up to the diagonal."""
    for rows in _blocks(p.shape[1]):
        total[:, rows, : rows.stop].baddbmm_(p[:, rows], p[:, : rows.stop].mT)


def mirror(total: Float[Tensor, "groups features features"]) -> Float[Tensor, "groups features features"]:
    """In place: what :func:`add_lower` left out above the diagonal, from below it."""
    for rows in _blocks(total.shape[1])[:-1]:
        total[:, rows, rows.stop :] = total[:, rows.stop :, rows].mT
    return total


def _blocks(features: int) -> list[slice]:
    """Slices of rows: several where there are many features."""
    blocks = _BLOCKS if features >= _BLOCKS * _ROWS_OF_A_BLOCK else 1
    edges = [features * i // blocks for i in range(blocks + 1)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
