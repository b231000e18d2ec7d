r"""Cross factors of neighbouring layers, beside those of the layers themselves [KFAC, sec. 4.3, 5].

For layers i and i + 1 of a chain: ``A_{i-1,i} = E[ā_{i-1} ā_iᵀ]`` and ``G_{i,i+1} = E[g_i g_{i+1}ᵀ]``, summed over the
very rows, draws and weights that give the layers' own factors. Only then is ``[[F̃_ii, F̃_i,i+1], [F̃_i+1,i, F̃_i+1,i+1]]``
positive semi-definite: an A or G that is known more exactly on its own must not stand beside them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from natgrad.curvature.base import LayerSums, to_dense
from natgrad.layers.capture import Record
from natgrad.layers.factors import cross_moment, flatten_rows

_ARROW = "→"


def pair_key(lower: str, upper: str) -> str:
    """Where the sums and factors of two neighbours stand among those of the layers."""
    return f"{lower}{_ARROW}{upper}"


def is_pair(name: str) -> bool:
    """Whether a key is that of two neighbours."""
    return _ARROW in name


def order_of(names: Sequence[str]) -> tuple[str, ...]:
    """The layers of a chain in forward order, from the keys of its layers and pairs."""
    following = dict(name.split(_ARROW) for name in names if is_pair(name))
    if not following:
        return tuple(names[:1])
    (first,) = following.keys() - set(following.values())
    order = [first]
    while order[-1] in following:
        order.append(following[order[-1]])
    return tuple(order)


class PairSums:
    """Sums over the rows of one pass: ``Σ ā_{i-1} ā_iᵀ`` at once, ``Σ g_i g_{i+1}ᵀ`` cotangent by cotangent.

    Args:
        record: of the forward pass.
        order: the layers of the chain in forward order.
        layers: the sums of the layers themselves, for sizes and number of rows.
        parts: per layer whether weight and bias are trained.
        leading: the examples that count among those of a tensor, and their share of what is returned.

    Raises:
        ValueError: neighbours that were used on different rows.
    """

    def __init__(
        self,
        record: Record,
        order: Sequence[str],
        layers: Mapping[str, LayerSums],
        parts: Mapping[str, tuple[bool, bool]],
        leading: Callable[[Tensor], tuple[Tensor, float]],
    ) -> None:
        self._neighbours = list(zip(order[:-1], order[1:], strict=True))
        self._leading = leading
        self.sums: dict[str, LayerSums] = {}
        inputs = record.inputs
        for lower, upper in self._neighbours:
            a, b = inputs[lower][0], inputs[upper][0]
            if a.shape[:-1] != b.shape[:-1]:
                raise ValueError(
                    f"layers {lower!r} and {upper!r} have inputs of shapes {list(a.shape)} and {list(b.shape)}: "
                    "their rows do not belong together one by one; use structure='block_diagonal' for this model"
                )
            dtype = record.blocks[lower].dtype
            (a, share), (b, _) = leading(a), leading(b)
            moment = cross_moment(a.to(dtype), b.to(dtype), parts[lower], parts[upper])
            G = moment.new_zeros(layers[lower].G.shape[0], layers[upper].G.shape[0])
            A = moment if share == 1 else moment.mul_(share)
            self.sums[pair_key(lower, upper)] = LayerSums(A, G, layers[lower].rows)

    def add(self, gradients: Mapping[str, list[Tensor]]) -> None:
        """Add one cotangent's ``Σ g_i g_{i+1}ᵀ``.

        Args:
            gradients: g of the only call, by layer name.
        """
        for lower, upper in self._neighbours:
            G = to_dense(self.sums[pair_key(lower, upper)].G)
            g, h = (flatten_rows(self._leading(gradients[name][0])[0]).to(G.dtype) for name in (lower, upper))
            torch.addmm(G, g.T, h, out=G)
