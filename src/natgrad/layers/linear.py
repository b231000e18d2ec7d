"""``nn.Linear`` on any number of leading dimensions."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from natgrad.layers.factors import flatten_rows, input_moment, second_moment
from natgrad.layers.rules import Block, KroneckerRule, LayerRule, Use


class LinearRule(KroneckerRule):
    """``s = W a + b``; every leading dimension but the first is one of positions. V is ``[W b]``."""

    features_last = True
    structures = (
        "block_diagonal",
        "block_tridiagonal",
        "ekfac",
        "full",
        "exact_block",
        "input_covariance",
        "layerwise",
    )

    @property
    def by_hand(self) -> bool:
        """True; not of a class derived from this one, which may do something else."""
        return type(self) is LinearRule and self.attributes == LayerRule.attributes

    def rows(self, use: Use) -> Float[Tensor, "examples positions in"]:
        """The input itself."""
        return _with_positions(use.input)

    def gradient_rows(self, use: Use, g: Tensor) -> Float[Tensor, "examples positions out"]:
        """The derivatives themselves."""
        return _with_positions(use.gradient(g))

    def input_sum(self, block: Block, use: Use) -> tuple[Tensor, float | Tensor]:
        """``Σ ā āᵀ`` and the number of rows."""
        if block.sharing == "reduce":
            return super().input_sum(block, use)
        a, times = use.input, 1
        rows = a.numel() / a.shape[-1]
        if use.every > 1:
            a, times = use.thinned(_with_positions(a))
        moment = input_moment(a.to(block.dtype), "weight" in block.members, "bias" in block.members)
        return moment if times == 1 else moment.mul_(times), rows

    def output_sum(self, block: Block, use: Use, g: Tensor, total: Tensor) -> None:
        """Add ``Σ g gᵀ``."""
        if block.sharing == "reduce":
            super().output_sum(block, use, g, total)
        else:  # the order of rows does not matter
            second_moment(flatten_rows(g).to(total.dtype), out=total)

    def shape(self, layer: Any, names: Any) -> tuple[int, ...]:
        """(out, in (+1))."""
        out, d = layer.weight.shape
        return out, d * ("weight" in names) + ("bias" in names)


def _with_positions(x: Tensor) -> Tensor:
    """``[examples, positions, features]``; a vector is one example."""
    return x.reshape(1, 1, -1) if x.ndim == 1 else x.reshape(x.shape[0], -1, x.shape[-1])
