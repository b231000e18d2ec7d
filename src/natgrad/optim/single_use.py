"""Inverses that are renewed at every step, so that each is used once: not written out where solves are cheaper."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from natgrad.curvature.base import Factors, entries
from natgrad.curvature.block_inverse import SolvedInverse
from natgrad.damping import FactoredTikhonov
from natgrad.linalg.spd import damped_cholesky, spd_inverse
from natgrad.optim.inverses import LayerInverses


class SingleUseInverses(LayerInverses):
    """As :class:`LayerInverses` with factored damping: A stays a Cholesky factor where V has fewer rows than columns.

    Two triangular solves with a V of d rows take as many operations as the product with an inverse; to write the
    inverse of an A of n columns takes ``⅔ n³`` more. With many rows the product's higher speed pays for that.
    """

    def refresh(self, factors: Mapping[str, Factors], damping: float | Tensor) -> None:
        """Decompose anew; a layer whose decomposition fails keeps what it had."""
        plain = {}
        for name, block in factors.items():
            A, G = entries(block.A), entries(block.G)
            if A.ndim != 2 or G.ndim != 2 or len(G) > len(A):
                plain[name] = block
                continue
            assert isinstance(self.form, FactoredTikhonov)  # for the type checker
            of_a, of_g = self.form.split(A, G, damping)
            L, ok = damped_cholesky(A, of_a)
            inverse, ok_g = spd_inverse(G, of_g)
            self._keep(name, SolvedInverse(L, inverse, ok & ok_g))
        super().refresh(plain, damping)

    def state(self, name: str, shapes: tuple[Sequence[int], Sequence[int]], like: Tensor) -> dict[str, Tensor]:
        """As that of :class:`LayerInverses`: inverses are written out."""
        kept = self._kept.get(name)
        if isinstance(kept, SolvedInverse):
            self._kept[name] = kept.written_out()  # a checkpoint and who goes on from here have the same numbers
        return super().state(name, shapes, like)
