r"""The covariance of per-example gradients in low-rank form, with its damped inverse: TONGA's metric.

With the n gradients as rows of R, the uncentred second moment is ``U = Rᵀ R / n`` and the covariance ``C = Rᵀ H R / n``
with ``H = I − 1 1ᵀ / n`` [NATGRAD, sec. 4.1, eqs. 12, 13]. Neither is ever written out. By the Woodbury identity

.. math:: (C + \lambda I)^{-1} v = \frac1\lambda \big(v - R^T H (n \lambda I + H R R^T H)^{-1} H R v\big),

which costs ``O(n² P)`` for the Gram matrix ``R Rᵀ`` and one Cholesky factorisation of an n × n matrix (N. Le Roux,
P.-A. Manzagol, Y. Bengio, "Topmoumoute online natural gradient algorithm", NIPS 2007, sec. 3.2).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.gradient_rows import GradientRows, RowBlock
from natgrad.curvature.per_example import PerExampleGradients
from natgrad.damping import check_damping
from natgrad.likelihoods import Likelihood
from natgrad.linalg.spd import safe_cholesky
from natgrad.model_view import Forward, ModelView
from natgrad.operators.base import LinearOperator
from natgrad.operators.gradient_moments import check_examples_apart
from natgrad.operators.jacobian_products import as_view
from natgrad.operators.sandwich import check_likelihood

Blocks = Literal["full", "layer", "tensor"]


class LowRankCovariance(LinearOperator):
    """The covariance of given per-example gradients: the same matrix as `natgrad.GradientCovariance`, with an inverse.

    Args:
        rows: the gradients.
        centered: False gives U, the second moment about zero.
        blocks: "full"; "layer" drops the covariance between layers; "tensor" also that between a layer's weight and
            bias.

    Raises:
        ValueError: unknown blocks.
    """

    def __init__(self, rows: GradientRows, *, centered: bool = True, blocks: Blocks = "full") -> None:
        check_blocks(blocks)
        view = rows.view
        p = view.num_parameters
        super().__init__((p, p), dtype=view.dtype, device=view.device, domain=view, codomain=view, symmetric=True)
        self.rows, self.centered, self.blocks = rows, centered, blocks
        self.groups = [GradientRows(view, group) for group in _groups(rows.blocks, blocks)]

    @cached_property
    def products(self) -> list[Float[Tensor, "n n"]]:
        """``R Rᵀ`` of every diagonal block, in float64 where the device has it; computed once."""
        return [group.gram().to(_accurate(group)) for group in self.groups]

    def grams(self) -> list[Float[Tensor, "n n"]]:
        """``H R Rᵀ H`` of every diagonal block (without H where uncentred)."""
        return [self.center(product) for product in self.products]

    def trace(self) -> Float[Tensor, ""]:
        """The trace of C: the sum of the variances of all elements of the gradient."""
        return torch.stack([gram.trace() for gram in self.grams()]).sum() / len(self.rows)

    def center(self, x: Float[Tensor, "n *m"]) -> Float[Tensor, "n *m"]:
        """``H x``, for a square matrix ``H x H``; x itself where the covariance is uncentred."""
        if not self.centered:
            return x
        x = x - x.mean(0, keepdim=True)
        return x if x.ndim == 1 else x - x.mean(1, keepdim=True)

    def eigenvalues(self) -> Float[Tensor, " n"]:
        """The n (per block) eigenvalues that may differ from zero, in ascending order; all others are zero."""
        n = len(self.rows)
        return torch.cat([torch.linalg.eigvalsh(gram) for gram in self.grams()]).clamp(min=0).sort().values / n

    def inverse(self, damping: float | Tensor) -> "LowRankInverse":
        """``(C + damping I)^{-1}`` as a linear operator.

        Args:
            damping: the coefficient of the identity, positive: fewer gradients than parameters leave C singular.

        Raises:
            ValueError: the damping is not positive.
        """
        check_damping(damping)
        if not isinstance(damping, Tensor) and damping == 0:
            mean = float(self.trace()) / len(self.rows)
            raise ValueError(
                f"damping=0: {len(self.rows)} gradients give a matrix of {self.shape[0]} rows of rank at most "
                f"{len(self.rows)}, which has no inverse; pass a damping, for example {mean or 1.0:.1e}, its mean "
                "eigenvalue on their span"
            )
        return LowRankInverse(self, damping)

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return _by_column(self._column, v)

    def _column(self, v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        directions, n = self.rows.view.to_dict(v), len(self.rows)
        return _assembled(self.groups, [self.center(group.project(directions)) / n for group in self.groups])


class LowRankInverse(LinearOperator):
    """``(C + damping I)^{-1}`` of a `LowRankCovariance`, by the Woodbury identity.

    Args:
        covariance: C.
        damping: the coefficient of the identity, positive.

    Attributes:
        ok: whether the inverse can be used: False where the gradients are not finite.
    """

    def __init__(self, covariance: LowRankCovariance, damping: float | Tensor) -> None:
        super().__init__(
            (covariance.shape[0], covariance.shape[1]),
            dtype=covariance.dtype,
            device=covariance.device,
            domain=covariance.domain,
            codomain=covariance.codomain,
            symmetric=True,
        )
        self.covariance, self.damping, n = covariance, damping, len(covariance.rows)
        self._roots: list[Tensor] = []
        ok = torch.ones((), dtype=torch.bool, device=covariance.device)
        for gram in covariance.grams():
            damped = gram if covariance.centered else gram.clone()
            damped.diagonal().add_(n * damping)
            root, fine = safe_cholesky(damped)
            self._roots.append(root)
            ok = ok & fine
        self.ok = ok

    def of_combination(self, u: Float[Tensor, " n"]) -> Float[Tensor, " P"]:
        """``(C + damping I)^{-1} Rᵀ u``, all of it in the space of the n examples but for one product with ``Rᵀ``.

        The gradient of a mean loss is such a combination, with ``u = 1 / n``.
        """
        found = []
        for raw, root in zip(self.covariance.products, self._roots, strict=True):
            right = u.to(raw.dtype)
            if self.covariance.centered:
                solved = _solve(root, self.covariance.center(raw @ right))
                found.append((right - self.covariance.center(solved)) / self.damping)
            else:  # Rᵀ (R Rᵀ / n + damping I)^{-1} u: nothing cancels
                found.append(_solve(root, right) * len(self.covariance.rows))
        return _assembled(self.covariance.groups, found)

    def _matmat(self, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return _by_column(self._column, v)

    def _column(self, v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        covariance = self.covariance
        directions = covariance.rows.view.to_dict(v)
        found = []
        for group, root in zip(covariance.groups, self._roots, strict=True):
            inner = covariance.center(group.project(directions).to(root.dtype))
            found.append(covariance.center(_solve(root, inner)))
        return (v - _assembled(covariance.groups, found)) / self.damping


def low_rank_covariance(
    model: nn.Module | ModelView,
    likelihood: Likelihood,
    x: Any,
    y: Any,
    *,
    centered: bool = True,
    blocks: Blocks = "full",
    forward: Forward | None = None,
    chunk_size: int | None = None,
) -> LowRankCovariance:
    """The covariance of the gradients of each example's own summed nll, over one batch.

    Args:
        model: the model, or a `ModelView` of it.
        likelihood: p(y|z).
        x: one batch.
        y: its targets.
        centered: False gives the second moment about zero.
        blocks: "full", "layer" or "tensor"; see `LowRankCovariance`.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.
        chunk_size: examples in one pass of ``torch.func``, for parameters outside of linear layers.

    Raises:
        ValueError: unknown blocks; batch normalisation in train mode couples the examples.
        TypeError: the likelihood lacks a method.
    """
    check_blocks(blocks)
    check_likelihood(likelihood)
    view = as_view(model, forward)
    check_examples_apart(view, "a covariance of gradients")
    with view.snapshot():
        passed = PerExampleGradients(view, chunk_size)(likelihood, x, y)
    return LowRankCovariance(passed.rows, centered=centered, blocks=blocks)


def check_blocks(blocks: str) -> None:
    """Raises a ValueError where the word is unknown."""
    if blocks not in get_args(Blocks):
        raise ValueError(f"blocks={blocks!r}: expected one of {', '.join(map(repr, get_args(Blocks)))}")


def _groups(rows: Sequence[RowBlock], blocks: Blocks) -> list[list[RowBlock]]:
    if blocks == "full":
        return [list(rows)]
    if blocks == "tensor":
        return [[tensor] for block in rows for tensor in block.tensors()]
    groups: dict[str, list[RowBlock]] = {}
    for block in rows:  # what has one module for its parent belongs together
        groups.setdefault(block.names[0].rpartition(".")[0], []).append(block)
    return list(groups.values())


def _assembled(groups: Sequence[GradientRows], c: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, " P"]:
    """``Rᵀ c`` with a vector c for each group of parameters."""
    found: dict[str, Tensor] = {}
    for group, one in zip(groups, c, strict=True):
        for block in group.blocks:
            found |= block.combine(one.to(block.dtype))
    return groups[0].view.to_vector(found)


def _by_column(product: Any, v: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
    return torch.stack([product(column) for column in v.T], 1) if v.shape[1] != 1 else product(v[:, 0])[:, None]


def _solve(root: Float[Tensor, "n n"], b: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.cholesky_solve(b[:, None], root)[:, 0]


def _accurate(rows: GradientRows) -> torch.dtype:
    return torch.float32 if rows.view.device.type == "mps" else torch.float64
