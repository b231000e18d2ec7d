"""`kronecker_fisher`: a Kronecker-factored estimate of the curvature of a loss, as an operator."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from natgrad.curvature.base import Statistics, factors_from, to_dense
from natgrad.curvature.batches import batches_of, following_global
from natgrad.curvature.cotangents import Expectation, check_expectation
from natgrad.curvature.dense import collect_dense
from natgrad.curvature.input_covariance import collect_inputs
from natgrad.curvature.inverse import Eigenbasis, eigenbasis
from natgrad.curvature.kfac import collect
from natgrad.curvature.operator import KroneckerCurvature
from natgrad.curvature.uncovered import squared_gradients
from natgrad.layers.capture import Capture
from natgrad.layers.coverage import Uncovered, cover
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView, batch_size
from natgrad.operators.sandwich import check_likelihood

__all__ = ["KroneckerCurvature", "kronecker_fisher"]

STRUCTURES = ("full", "block_diagonal", "block_tridiagonal", "ekfac", "input_covariance", "exact_block")


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
    sharing: str | Mapping[str, str] = "expand",
) -> KroneckerCurvature:
    r"""The Fisher matrix of ``likelihood.nll`` in Kronecker factors per layer [KFAC, sec. 3].

    With ``ā`` the input of a layer and the homogeneous 1, g the derivative of an example's nll with respect to the
    layer's output:

    - ``"block_diagonal"``: F̆, blocks ``A ⊗ G`` with ``A = E[ā āᵀ]``, ``G = E[g gᵀ]`` [KFAC, sec. 4.2];
    - ``"block_tridiagonal"``: F̂, whose inverse is block-tridiagonal and which agrees with F̃ on the tridiagonal blocks
      [KFAC, sec. 4.3]. For chains of layers, each fed by the one before it;
    - ``"full"``: F̃, blocks ``E[ā_i ā_jᵀ] ⊗ E[g_i g_jᵀ]`` for every pair of layers [KFAC, sec. 3];
    - ``"ekfac"``: blocks ``Q diag(S) Qᵀ``, Q the eigenvectors of ``A ⊗ G`` and S the second moments of the per-example
      gradient in that basis (George et al. 2018): nearer to F than F̆. Two passes over x, with the same draws;
    - ``"exact_block"``: ``E[ā āᵀ ⊗ g gᵀ]`` per layer, no approximation within it;
    - ``"input_covariance"``: ``A ⊗ α I`` [THESIS, sec. 6.3.2].

    ``"full"`` and ``"exact_block"`` hold dense matrices: small models only. On sequences rows are uses of a layer,
    one per example and position ("expand"): A is summed and G averaged over the uses of an example. "full" pairs rows
    by position.

    Args:
        model: any module. ``"block_diagonal"`` and ``"ekfac"`` cover the layers listed on the page "Layers"; the other
            structures cover ``nn.Linear`` (for the rest see ``uncovered``).
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
        sharing: how the positions of an example count where a layer acts at several (sequences, convolutions):
            ``"expand"``, every one is a use, or ``"reduce"``, the mean of ā and the sum of g per example; or a mapping
            from layer names (others expand).

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
    coverage = cover(view, uncovered, structure, sharing)
    generator = generator or following_global(view.device)
    options: dict[str, Any] = {"expectation": expectation, "samples": samples, "generator": generator}
    streams: list[Tensor] = []  # where each batch's draws began
    capture = Capture(model, coverage.blocks)
    statistics: Statistics | None = None
    squares: dict[str, Tensor] = {}
    try:
        for batch, targets, weights in batches_of(x, y, weight):
            batch_size(batch)  # refuses an empty batch
            given = {**options, "y": targets, "weight": weights}
            streams.append(generator.get_state())
            if structure == "input_covariance":
                new = collect_inputs(view, capture, likelihood, batch, y=targets, weight=weights)
            elif structure in ("block_diagonal", "block_tridiagonal", "ekfac"):
                chain = structure == "block_tridiagonal"
                new = collect(view, capture, likelihood, batch, chain=chain, **given)
            else:
                new = collect_dense(view, capture, likelihood, batch, structure=structure, **given)
            statistics = new if statistics is None else statistics + new
            if uncovered == "diagonal" and coverage.uncovered:
                found = squared_gradients(view, likelihood, batch, coverage.uncovered, **given)
                squares = {name: squares[name] + found[name] if squares else found[name] for name in found}
        if statistics is None:
            raise ValueError("x: an iterable without a batch; expected at least one")
        _check_finite(statistics)
        bases: dict[str, Eigenbasis] = {}
        if structure == "ekfac":
            bases = {name: eigenbasis(factors, check=True) for name, factors in factors_from(statistics).items()}
            again = torch.Generator(device=generator.device)
            statistics = _second_pass(
                view, capture, likelihood, batches_of(x, y, weight), streams, bases, {**options, "generator": again}
            )
    finally:
        capture.remove()
    if uncovered == "diagonal":
        diagonals = {name: total / statistics.count for name, total in squares.items()}
    else:
        diagonals = {name: torch.ones_like(view.parameters[name].detach()) for name in coverage.uncovered}
    return KroneckerCurvature(view, coverage, structure, statistics, diagonals, alpha, bases)


def _second_pass(
    view: ModelView,
    capture: Capture,
    likelihood: Likelihood,
    batches: Iterable[tuple[Any, Any, Any]],
    streams: list[Tensor],
    bases: dict[str, Eigenbasis],
    options: dict[str, Any],
) -> Statistics:
    """The statistics of the first pass and the squared gradients in the eigenbasis of its factors; the same draws."""
    statistics: Statistics | None = None
    for (batch, y, weight), stream in zip(batches, streams, strict=True):
        options["generator"].set_state(stream)
        new = collect(view, capture, likelihood, batch, y=y, weight=weight, bases=bases, **options)
        statistics = new if statistics is None else statistics + new
    assert statistics is not None  # there was a batch
    return statistics


def _check_finite(statistics: Statistics) -> None:
    for name, sums in statistics.layers.items():
        for which, total in (("inputs", sums.A), ("output derivatives", sums.G)):
            if not torch.isfinite(to_dense(total)).all():
                where = f"of layer {name!r} " if name else ""
                raise ValueError(
                    f"x: the {which} {where}are not all finite; look for NaN or infinite values in the data or "
                    "the parameters"
                )
