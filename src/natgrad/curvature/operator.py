"""The operator that `kronecker_fisher` returns: blocks made of Kronecker factors, and their damped inverses."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.curvature.base import Factors, Statistics, entries, factors_from, to_dense
from natgrad.curvature.block_inverse import FactoredInverse
from natgrad.curvature.dense import pair_blocks
from natgrad.curvature.ekfac import EigenBlock, with_second_moments
from natgrad.curvature.input_covariance import input_covariance_factors, input_covariance_inverse
from natgrad.curvature.inverse import Eigenbasis, invert_block
from natgrad.curvature.pairs import order_of, pair_key
from natgrad.curvature.tridiagonal import LayerChain
from natgrad.damping import ExactTikhonov, FactoredTikhonov, check_damping
from natgrad.layers.coverage import Coverage
from natgrad.linalg.spd import safe_eigh, spd_inverse
from natgrad.model_view import ModelView
from natgrad.operators.base import LinearOperator
from natgrad.operators.kronecker import BlockDiagonal, Dense, Kronecker, layer_index, parameter_index


class KroneckerCurvature(BlockDiagonal):
    """A symmetric operator on parameters, built from Kronecker factors of layers; never changes.

    Attributes:
        structure: as asked for.
        factors: per layer its A and G, for "ekfac" also S. For "full" those of the diagonal blocks; empty for
            "exact_block".
        bases: per layer the eigenbasis of A and G, for "ekfac".
        pairs: for "block_tridiagonal" the cross factors ``E[ā_{i-1} ā_iᵀ]`` and ``E[g_i g_{i+1}ᵀ]`` of neighbours, by
            the names of the two layers, in forward order.
    """

    def __init__(
        self,
        view: ModelView,
        coverage: Coverage,
        structure: str,
        statistics: Statistics,
        diagonals: Mapping[str, Tensor],
        alpha: float = 1.0,
        bases: Mapping[str, Eigenbasis] | None = None,
    ) -> None:
        self.structure = structure
        self.bases = dict(bases or {})
        self.pairs: dict[tuple[str, str], Factors] = {}
        self._coverage = coverage
        self._alpha = alpha
        self._diagonals = {name: diagonals[name].reshape(-1) for name in coverage.uncovered}
        self._indices = {name: layer_index(view, block) for name, block in coverage.blocks.items()}
        found = factors_from(statistics)
        blocks: list[tuple[Tensor, LinearOperator]] = []
        if structure == "full":
            self.factors = _diagonal_pairs(found[""], coverage)
            matrix = pair_blocks(to_dense(found[""].A), to_dense(found[""].G), _sizes(coverage))
            blocks.append((torch.cat(list(self._indices.values())), Dense(matrix)))
        elif structure == "exact_block":
            self.factors: dict[str, Factors] = {}
            blocks += [(self._indices[name], Dense(to_dense(f.A) * to_dense(f.G))) for name, f in found.items()]
        elif structure == "block_tridiagonal":
            order = order_of(list(found))
            self.factors = {name: found[name] for name in coverage.layers}
            self.pairs = {pair: found[pair_key(*pair)] for pair in zip(order, order[1:], strict=False)}
            self._chain = LayerChain.of(order, [found[name] for name in order], list(self.pairs.values()))
            blocks.append((torch.cat([self._indices[name] for name in order]), self._chain.fisher()))
        elif structure == "ekfac":
            self.factors = {name: with_second_moments(f, self.bases[name]) for name, f in found.items()}
            scalings = {name: f.S for name, f in self.factors.items() if f.S is not None}
            blocks += [(self._indices[name], EigenBlock(self.bases[name], S)) for name, S in scalings.items()]
        else:
            self.factors = input_covariance_factors(found, alpha) if structure == "input_covariance" else found
            blocks += [(self._indices[name], Kronecker(*_plain(f))) for name, f in self.factors.items()]
        blocks += [(parameter_index(view, n), _diagonal_operator(d)) for n, d in self._diagonals.items()]
        super().__init__(view, blocks)

    def coverage(self) -> Coverage:
        """What is treated how; ``print`` it for a table with parameter counts."""
        return self._coverage

    def inverse(
        self, damping: float | Tensor = 0.0, kind: str | FactoredTikhonov | ExactTikhonov | None = None
    ) -> BlockDiagonal:
        r"""The damped inverse as an operator on parameters.

        ======================  =====================================================================
        kind                    block
        ======================  =====================================================================
        ``"factored"``          ``(A + π γ I)^{-1} ⊗ (G + γ/π I)^{-1}``, γ = √damping [KFAC, eq. 7]; for
                                "block_tridiagonal" F̂^{-1} of the factors damped so [KFAC, sec. 4.3]
        ``"exact"``             ``(block + damping I)^{-1}`` [KFAC, eq. 6]
        ======================  =====================================================================

        Parameters that no factor covers have ``1 / (diagonal + damping)`` in both.

        Args:
            damping: the coefficient of the identity, γ² = λ + η.
            kind: ``"factored"`` (block_diagonal and block_tridiagonal, and their default), ``"exact"`` (all but
                block_tridiagonal; the default of the others), or an object: ``FactoredTikhonov(pi=...)`` chooses the
                norm in π.

        Raises:
            ValueError: an unknown kind, or one that the structure does not have; a negative damping; the undamped
                inverse of a singular block, with a damping that would do.
        """
        check_damping(damping)
        rule = self._rule(kind)
        blocks: list[tuple[Tensor, LinearOperator]] = []
        if self.structure in ("full", "exact_block"):
            for index, block in self.blocks[: len(self.blocks) - len(self._diagonals)]:
                blocks.append((index, Dense(_dense_inverse(block._dense(), damping))))
        elif self.structure == "block_tridiagonal":
            assert isinstance(rule, FactoredTikhonov)  # the only one that _rule lets through
            blocks.append((self.blocks[0][0], self._chain.inverse(damping, rule)))
        elif self.structure == "ekfac":
            for (index, block), name in zip(self.blocks, self.factors, strict=False):
                assert isinstance(block, EigenBlock)
                blocks.append((index, block.inverse(damping, f"the block of layer {name!r}")))
        else:
            for name, factors in self.factors.items():
                what = f"the block of layer {name!r}"
                if self.structure == "input_covariance":
                    inverse = input_covariance_inverse(factors, damping, self._alpha, what)
                else:
                    inverse = invert_block(factors, damping, rule, check=True, what=what)
                blocks.append((self._indices[name], _InverseOperator(inverse, self._indices[name].numel(), self)))
        for (index, _), (name, diagonal) in zip(
            self.blocks[len(self.blocks) - len(self._diagonals) :], self._diagonals.items(), strict=True
        ):
            blocks.append((index, _diagonal_operator(_diagonal_inverse(name, diagonal, damping))))
        assert self.domain is not None  # BlockDiagonal acts on parameters
        return BlockDiagonal(self.domain, blocks)

    def _rule(self, kind: Any) -> FactoredTikhonov | ExactTikhonov:
        factored = self.structure in ("block_diagonal", "block_tridiagonal")
        named = {
            None: FactoredTikhonov() if factored else ExactTikhonov(),
            "exact": ExactTikhonov(),
            "factored": FactoredTikhonov(),
        }
        rule = kind if isinstance(kind, FactoredTikhonov | ExactTikhonov) else named.get(kind)
        if rule is None:
            raise ValueError(f"kind={kind!r}: expected 'factored', 'exact', FactoredTikhonov(...) or ExactTikhonov()")
        if self.structure == "block_tridiagonal" and getattr(rule, "solver", None) is not None:
            raise ValueError(f"kind={rule}: a solver is for structure 'block_diagonal'; leave it out")
        if isinstance(rule, FactoredTikhonov) and not factored:
            raise ValueError(
                f"kind='factored' is for structure 'block_diagonal' or 'block_tridiagonal'; {self.structure!r} has "
                "kind='exact'"
            )
        if isinstance(rule, ExactTikhonov) and self.structure == "block_tridiagonal":
            raise ValueError(
                "kind='exact': F̂ + damping I has no inverse of this form [KFAC, sec. 6.3]; use kind='factored', or "
                "structure='block_diagonal' for exact damping"
            )
        return rule


def _sizes(coverage: Coverage) -> list[tuple[int, int]]:
    """(columns, out) per layer."""
    return [(block.shape[1], block.shape[0]) for block in coverage.blocks.values()]


def _diagonal_pairs(pairs: Factors, coverage: Coverage) -> dict[str, Factors]:
    A, G = to_dense(pairs.A), to_dense(pairs.G)
    factors: dict[str, Factors] = {}
    i = j = 0
    for name, (columns, out) in zip(coverage.layers, _sizes(coverage), strict=True):
        factors[name] = Factors(A[i : i + columns, i : i + columns], G[j : j + out, j : j + out])
        i, j = i + columns, j + out
    return factors


def _plain(factors: Factors) -> tuple[Tensor, Tensor]:
    return entries(factors.A), entries(factors.G)


def _diagonal_operator(diagonal: Tensor) -> Kronecker:
    return Kronecker(diagonal.new_ones(1), diagonal)


def _dense_inverse(matrix: Tensor, damping: float | Tensor) -> Tensor:
    if float(damping) == 0:
        values = safe_eigh(matrix, check=True).values
        precision = torch.finfo(matrix.dtype).eps * len(values)
        if values[0] <= values[-1] * precision:
            raise ValueError(
                f"the curvature is singular (eigenvalues from {values[0]:.1e} to {values[-1]:.1e}) and has no undamped "
                f"inverse; pass a damping, for example damping={1e-3 * float(values.mean()) or 1e-3:.1e}"
            )
    return spd_inverse(matrix, damping, check=True, what="the curvature").value


def _diagonal_inverse(name: str, diagonal: Tensor, damping: float | Tensor) -> Tensor:
    damped = diagonal + damping
    if not (damped > 0).all():
        raise ValueError(
            f"the diagonal of {name} has zeros and no undamped inverse; pass a damping, for example "
            f"damping={1e-3 * float(diagonal.mean()) or 1e-3:.1e}"
        )
    return damped.reciprocal()


class _InverseOperator(LinearOperator):
    """A block's inverse on stacked columns."""

    def __init__(self, inverse: Any, size: int, like: LinearOperator) -> None:
        super().__init__((size, size), dtype=like.dtype, device=like.device, symmetric=True)
        self.inverse = inverse
        if isinstance(inverse, FactoredInverse):
            self._product: Kronecker | None = Kronecker(inverse.A, inverse.G)
        else:
            self._product = None

    def _matmat(self, v: Tensor) -> Tensor:
        if self._product is not None:
            return self._product._matmat(v)
        *stack, out, columns = self.inverse.shape
        applied = [self.inverse.apply(column.reshape(*stack, columns, out).mT).mT.reshape(-1) for column in v.T]
        return torch.stack(applied, dim=1)
