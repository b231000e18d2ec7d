"""How far approximations are from the exact Fisher matrix, and their inverses from its inverse [KFAC, figs. 2-6]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.fisher import kronecker_fisher
from natgrad.diagnostics.passes import linear_layers
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.autodiff import Fisher

STRUCTURES = ("full", "block_diagonal", "ekfac")


@dataclass(frozen=True)
class Residual:
    """``R = exact − approximation``, block by block and in total.

    Attributes:
        layers: the layers' names, in the order of rows and columns.
        frobenius: of every block of R.
        absolute: the sum of the absolute entries of every block of R.
        exact: the Frobenius norm of every block of the exact matrix.
    """

    layers: tuple[str, ...]
    frobenius: Float[Tensor, "layers layers"]
    absolute: Float[Tensor, "layers layers"]
    exact: Float[Tensor, "layers layers"]

    @property
    def total(self) -> float:
        """The Frobenius norm of R."""
        return float(self.frobenius.norm())

    @property
    def relative(self) -> float:
        """Of R, in units of that of the exact matrix."""
        return self.total / float(self.exact.norm())

    @property
    def total_absolute(self) -> float:
        """The sum of the absolute entries of R."""
        return float(self.absolute.sum())

    @property
    def diagonal(self) -> dict[str, float]:
        """Relative Frobenius error of every layer's own block."""
        pairs = zip(self.layers, self.frobenius.diagonal(), self.exact.diagonal(), strict=True)
        return {name: float(error / norm) for name, error, norm in pairs}

    def captured(self) -> float:
        """How much of the exact matrix the approximation holds: ``1 − ‖R‖² / ‖F‖²``."""
        return 1 - self.relative**2

    def __str__(self) -> str:
        """The totals and each layer's block, one line each."""
        lines = [f"relative Frobenius error {self.relative:.4f}, sum of absolute errors {self.total_absolute:.4g}"]
        return "\n".join([*lines, *(f"  {name or '(model)'}: {error:.4f}" for name, error in self.diagonal.items())])


def residual(
    exact: Float[Tensor, "n n"],
    approximation: Float[Tensor, "n n"],
    sizes: Sequence[int],
    layers: Sequence[str] | None = None,
) -> Residual:
    """Compare two matrices block by block.

    Args:
        exact: in the order of the blocks.
        approximation: likewise.
        sizes: of the blocks.
        layers: their names; numbers by default.

    Raises:
        ValueError: the sizes do not add up to n.
    """
    if exact.shape != approximation.shape or sum(sizes) != exact.shape[0]:
        raise ValueError(
            f"sizes: {list(sizes)} add up to {sum(sizes)}; the matrices are {tuple(exact.shape)} and "
            f"{tuple(approximation.shape)}"
        )
    difference = exact - approximation

    def over_blocks(matrix: Tensor, size: Any) -> Tensor:
        rows = matrix.split(list(sizes))
        return torch.stack([torch.stack([size(block) for block in row.split(list(sizes), dim=1)]) for row in rows])

    names = tuple(map(str, range(len(sizes)))) if layers is None else tuple(layers)
    return Residual(
        names,
        over_blocks(difference, torch.linalg.matrix_norm),
        over_blocks(difference, lambda block: block.abs().sum()),
        over_blocks(exact, torch.linalg.matrix_norm),
    )


def fisher_residuals(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    *,
    structures: Sequence[str] = STRUCTURES,
    damping: float | None = None,
    kinds: Mapping[str, str] | None = None,
    y: Any = None,
    forward: Forward | None = None,
) -> dict[str, Residual]:
    """How far each structure of `natgrad.kronecker_fisher` is from the exact Fisher matrix: small models only.

    Args:
        model: a model whose trainable parameters are those of ``nn.Linear`` layers.
        likelihood: p(y | z).
        x: one batch.
        structures: what to compare: F̃ is "full", F̆ "block_diagonal".
        damping: with a number the inverses are compared: ``(F + damping I)^{-1}`` with ``k.inverse(damping)``.
        kinds: the ``kind`` of ``inverse`` by structure, where it shall not be the default one.
        y: targets, where the curvature depends on them.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Returns:
        one :class:`Residual` per structure, all expectations exact and over the same data.
    """
    view = ModelView(model, forward)
    sizes = layer_sizes(view)
    exact = Fisher(model, likelihood, x, y=y, forward=forward).to_dense(order="vec")
    if damping is not None:
        exact = torch.linalg.inv(exact + damping * torch.eye(len(exact), dtype=exact.dtype, device=exact.device))
    found = {}
    for structure in structures:
        k = kronecker_fisher(model, likelihood, x, structure=structure, expectation="exact", y=y, forward=forward)
        operator = k if damping is None else k.inverse(damping, kind=(kinds or {}).get(structure))
        found[structure] = residual(exact, operator.to_dense(order="vec"), list(sizes.values()), list(sizes))
    return found


def layer_sizes(view: ModelView) -> dict[str, int]:
    """The number of trainable parameters of every layer, in the order of the modules.

    Raises:
        ValueError: a parameter belongs to no ``nn.Linear`` layer; it is named.
    """
    coverage = linear_layers(view)
    return {
        name: sum(coverage.sizes[member] for member in members if member is not None)
        for name, members in coverage.members.items()
    }
