"""`kronecker_fisher`: a Kronecker-factored estimate of the curvature of a loss, as an operator."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from natgrad.curvature.base import Diagonal, Factors, Statistics, factors_from, to_dense
from natgrad.curvature.cotangents import Expectation, check_expectation
from natgrad.curvature.dense import collect_dense, pair_blocks
from natgrad.curvature.input_covariance import collect_inputs, input_covariance_factors, input_covariance_inverse
from natgrad.curvature.inverse import FactoredInverse, invert_block
from natgrad.curvature.kfac import collect
from natgrad.curvature.uncovered import squared_gradients
from natgrad.damping import ExactTikhonov, FactoredTikhonov, check_damping
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Coverage, Uncovered, cover
from natgrad.likelihoods import Likelihood
from natgrad.linalg.spd import safe_eigh, spd_inverse
from natgrad.model_view import Forward, ModelView, batch_size
from natgrad.operators.base import LinearOperator
from natgrad.operators.kronecker import BlockDiagonal, Dense, Kronecker, layer_index, parameter_index
from natgrad.operators.sandwich import check_likelihood

STRUCTURES = ("full", "block_diagonal", "input_covariance", "exact_block")


class KroneckerCurvature(BlockDiagonal):
    """A symmetric operator on parameters, built from Kronecker factors of layers; never changes.

    Attributes:
        structure: as asked for.
        factors: per layer its A and G. For "full" those of the diagonal blocks; empty for "exact_block".
    """

    def __init__(
        self,
        view: ModelView,
        coverage: Coverage,
        structure: str,
        statistics: Statistics,
        diagonals: Mapping[str, Tensor],
        alpha: float = 1.0,
    ) -> None:
        self.structure = structure
        self._coverage = coverage
        self._alpha = alpha
        self._diagonals = {name: diagonals[name].reshape(-1) for name in coverage.uncovered}
        self._indices = {name: layer_index(view, *members) for name, members in coverage.members.items()}
        found = factors_from(statistics)
        blocks: list[tuple[Tensor, LinearOperator]] = []
        if structure == "full":
            self.factors = _diagonal_pairs(found[""], coverage)
            matrix = pair_blocks(to_dense(found[""].A), to_dense(found[""].G), _sizes(coverage))
            blocks.append((torch.cat(list(self._indices.values())), Dense(matrix)))
        elif structure == "exact_block":
            self.factors: dict[str, Factors] = {}
            blocks += [(self._indices[name], Dense(to_dense(f.A) * to_dense(f.G))) for name, f in found.items()]
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
        ``"factored"``          ``(A + π γ I)^{-1} ⊗ (G + γ/π I)^{-1}``, γ = √damping [KFAC, eq. 7]
        ``"exact"``             ``(block + damping I)^{-1}`` [KFAC, eq. 6]
        ======================  =====================================================================

        Parameters that no factor covers have ``1 / (diagonal + damping)`` in both.

        Args:
            damping: the coefficient of the identity, γ² = λ + η.
            kind: ``"factored"`` (block_diagonal only, and its default), ``"exact"`` (the default of the others), or
                an object: ``FactoredTikhonov(pi=...)`` chooses the norm in π.

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
        factored = self.structure == "block_diagonal"
        named = {
            None: FactoredTikhonov() if factored else ExactTikhonov(),
            "exact": ExactTikhonov(),
            "factored": FactoredTikhonov(),
        }
        rule = kind if isinstance(kind, FactoredTikhonov | ExactTikhonov) else named.get(kind)
        if rule is None:
            raise ValueError(f"kind={kind!r}: expected 'factored', 'exact', FactoredTikhonov(...) or ExactTikhonov()")
        if isinstance(rule, FactoredTikhonov) and not factored:
            raise ValueError(f"kind='factored' is for structure 'block_diagonal'; {self.structure!r} has kind='exact'")
        return rule


def kronecker_fisher(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    *,
    structure: str = "block_diagonal",
    expectation: Expectation = "exact",
    y: Any = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    weight: Any = None,
    alpha: float = 1.0,
    uncovered: Uncovered = "error",
) -> KroneckerCurvature:
    r"""The Fisher matrix of ``likelihood.nll`` in Kronecker factors per layer [KFAC, sec. 3].

    With ``ā`` the input of a layer and the homogeneous 1, g the derivative of an example's nll with respect to the
    layer's output:

    - ``"block_diagonal"``: F̆, blocks ``A ⊗ G`` with ``A = E[ā āᵀ]``, ``G = E[g gᵀ]`` [KFAC, sec. 4.2];
    - ``"full"``: F̃, blocks ``E[ā_i ā_jᵀ] ⊗ E[g_i g_jᵀ]`` for every pair of layers [KFAC, sec. 3];
    - ``"exact_block"``: ``E[ā āᵀ ⊗ g gᵀ]`` per layer, no approximation within it;
    - ``"input_covariance"``: ``A ⊗ α I`` [THESIS, sec. 6.4.1].

    ``"full"`` and ``"exact_block"`` hold dense matrices: small models only. On sequences rows are uses of a layer,
    one per example and position ("expand"): A is summed and G averaged over the uses of an example. "full" pairs rows
    by position.

    Args:
        model: any module whose trainable parameters are those of ``nn.Linear`` layers (see ``uncovered``).
        likelihood: p(y | z).
        x: one batch (a tensor, a tuple or a mapping, as the model is called), or a re-iterable of batches: the result
            is that of all their examples together, for any split.
        structure: one of the above.
        expectation: over targets: ``"exact"`` (all of F_R, by one backward pass per output), ``"sampled"`` (y drawn
            from the model, [KFAC, sec. 5]) or ``"empirical"`` (the y given: another matrix, that of
            ``EmpiricalFisher``).
        y: targets, or a re-iterable of them beside a re-iterable x; for ``"empirical"`` and for likelihoods whose
            curvature depends on them.
        samples: draws of y per example; every draw is joint over outputs and positions.
        generator: the source of the draws. Without one they follow from the state of the global generator, which does
            not move: pass a generator to get other draws at the next call.
        forward: ``forward(model, inputs) -> z`` where the default call convention does not fit.
        weight: weights of the loss, as for ``likelihood.nll``; beside a re-iterable x a re-iterable.
        alpha: α of ``"input_covariance"``.
        uncovered: parameters without a factor: ``"error"``, an ``"identity"`` block, or the ``"diagonal"`` of the
            Fisher matrix.

    Returns:
        a symmetric operator on the parameters: ``@``, ``to_dense``, ``factors``, ``inverse``, ``coverage``.

    Raises:
        ValueError: an unknown word, missing targets, an uncovered parameter (named), an empty batch, or statistics
            that are not finite.
        TypeError: x can be iterated once only.
    """
    check_likelihood(likelihood)
    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure!r}: expected one of {', '.join(map(repr, STRUCTURES))}")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: expected a positive number")
    if structure != "input_covariance":
        check_expectation(likelihood, expectation, y, samples)
    elif expectation not in get_args(Expectation):
        check_expectation(likelihood, expectation, y, samples)
    view = ModelView(model, forward)
    coverage = cover(view, uncovered)
    generator = generator or _following_global(view.device)
    options: dict[str, Any] = {"expectation": expectation, "samples": samples, "generator": generator}
    capture = Capture(model, coverage.layers)
    statistics: Statistics | None = None
    squares: dict[str, Tensor] = {}
    try:
        for batch, targets, weights in batches_of(x, y, weight):
            batch_size(batch)  # refuses an empty batch
            given = {**options, "y": targets, "weight": weights}
            if structure == "input_covariance":
                new = collect_inputs(view, capture, likelihood, batch, y=targets, weight=weights)
            elif structure == "block_diagonal":
                new = collect(view, capture, likelihood, batch, **given)
            else:
                new = collect_dense(view, capture, likelihood, batch, structure=structure, **given)
            statistics = new if statistics is None else statistics + new
            if uncovered == "diagonal" and coverage.uncovered:
                found = squared_gradients(view, likelihood, batch, coverage.uncovered, **given)
                squares = {name: squares[name] + found[name] if squares else found[name] for name in found}
    finally:
        capture.remove()
    if statistics is None:
        raise ValueError("x: an iterable without a batch; expected at least one")
    _check_finite(statistics)
    if uncovered == "diagonal":
        diagonals = {name: total / statistics.count for name, total in squares.items()}
    else:
        diagonals = {name: torch.ones_like(view.parameters[name].detach()) for name in coverage.uncovered}
    return KroneckerCurvature(view, coverage, structure, statistics, diagonals, alpha)


def batches_of(x: Any, y: Any = None, weight: Any = None) -> Iterator[tuple[Any, Any, Any]]:
    """(inputs, targets, weight) of every batch; a tensor, a tuple or a mapping is one batch.

    Raises:
        TypeError: x is an iterator, which could be iterated once only, or no iterable.
        ValueError: y or weight have another number of batches.
    """
    if isinstance(x, Tensor | tuple | Mapping):
        yield x, y, weight
        return
    if not isinstance(x, Iterable) or isinstance(x, Iterator):
        raise TypeError(
            f"x: expected one batch (a tensor, a tuple, a mapping) or a re-iterable of batches such as a list, "
            f"got {type(x).__name__}"
        )
    missing = object()
    others = [iter(other) if other is not None else None for other in (y, weight)]
    for batch in x:
        found = [None if other is None else next(other, missing) for other in others]
        if missing in [f for f in found if not isinstance(f, Tensor)]:
            raise ValueError("y, weight: fewer batches than x; pass one of each per batch")
        yield batch, found[0], found[1]


def _following_global(device: torch.device) -> torch.Generator:
    """A generator that continues the global one, which stays where it is."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device=device).manual_seed(seed)


def _check_finite(statistics: Statistics) -> None:
    for name, sums in statistics.layers.items():
        for which, total in (("inputs", sums.A), ("output derivatives", sums.G)):
            if not torch.isfinite(total).all():
                where = f"of layer {name!r} " if name else ""
                raise ValueError(
                    f"x: the {which} {where}are not all finite; look for NaN or infinite values in the data or "
                    "the parameters"
                )


def _sizes(coverage: Coverage) -> list[tuple[int, int]]:
    """(columns, out) per layer."""
    return [
        (layer.in_features * (weight is not None) + (bias is not None), layer.out_features)
        for layer, (weight, bias) in zip(coverage.layers.values(), coverage.members.values(), strict=True)
    ]


def _diagonal_pairs(pairs: Factors, coverage: Coverage) -> dict[str, Factors]:
    A, G = to_dense(pairs.A), to_dense(pairs.G)
    factors: dict[str, Factors] = {}
    i = j = 0
    for name, (columns, out) in zip(coverage.layers, _sizes(coverage), strict=True):
        factors[name] = Factors(A[i : i + columns, i : i + columns], G[j : j + out, j : j + out])
        i, j = i + columns, j + out
    return factors


def _plain(factors: Factors) -> tuple[Tensor, Tensor]:
    A, G = (f.vector if isinstance(f, Diagonal) else f for f in (factors.A, factors.G))
    return A, G


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
        out, columns = self.inverse.scale.shape
        applied = [self.inverse.apply(column.reshape(columns, out).T).T.reshape(-1) for column in v.T]
        return torch.stack(applied, dim=1)
