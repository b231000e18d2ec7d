r"""Why ``E[ā ā'] E[g g']`` is near to ``E[ā ā' g g']``: the error as higher cumulants [KFAC, sec. 3.1, app. A].

For two weights with inputs ``a1, a2`` and output derivatives ``g1, g2`` [KFAC, eqs. 3, 4]:

.. math::
    \mathrm E[a_1 a_2 g_1 g_2] - \mathrm E[a_1 a_2] \mathrm E[g_1 g_2]
    = \kappa(a_1, a_2, g_1, g_2) + \mathrm E[a_1] \kappa(a_2, g_1, g_2) + \mathrm E[a_2] \kappa(a_1, g_1, g_2),

and the sum of the absolute values of the three terms bounds it. All expectations are over the batch and over targets
of the model's own distribution, for which ``E[u g] = 0`` where u is any function of the inputs (Lemma 4); with the
training targets the identity fails.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.diagnostics.passes import Pass, exact_pass
from natgrad.likelihoods import Likelihood
from natgrad.model_view import Forward


@dataclass(frozen=True)
class PairCumulants:
    """The three terms for all pairs of weights of two layers.

    Entry ``[k1, k2, k3, k4]`` is that of ``a1 = [ā_i]_k1``, ``g1 = [g_i]_k2``, ``a2 = [ā_j]_k3``, ``g2 = [g_j]_k4``.

    Attributes:
        fourth: ``κ(a1, a2, g1, g2)``.
        first_mean: ``E[a1] κ(a2, g1, g2)``.
        second_mean: ``E[a2] κ(a1, g1, g2)``.
        error: ``E[a1 a2 g1 g2] − E[a1 a2] E[g1 g2]``, from the moments themselves.
    """

    fourth: Float[Tensor, "in_i out_i in_j out_j"]
    first_mean: Float[Tensor, "in_i out_i in_j out_j"]
    second_mean: Float[Tensor, "in_i out_i in_j out_j"]
    error: Float[Tensor, "in_i out_i in_j out_j"]

    @property
    def expression(self) -> Float[Tensor, "in_i out_i in_j out_j"]:
        """The right-hand side of [KFAC, eq. 3]."""
        return self.fourth + self.first_mean + self.second_mean

    @property
    def bound(self) -> Float[Tensor, "in_i out_i in_j out_j"]:
        """[KFAC, eq. 4]."""
        return self.fourth.abs() + self.first_mean.abs() + self.second_mean.abs()


@dataclass(frozen=True)
class CumulantReport:
    """Total absolute error of F̃ and its bound, per pair of layers.

    Attributes:
        layers: their names, in the order of rows and columns.
        error: ``Σ |F − F̃|`` over the entries of each block.
        bound: the sum of [KFAC, eq. 4] over them.
    """

    layers: tuple[str, ...]
    error: Float[Tensor, "layers layers"]
    bound: Float[Tensor, "layers layers"]

    @property
    def total_error(self) -> float:
        """Over all pairs of weights; [KFAC, sec. 3.1] reports 2894.4 for the middle layers of figure 2's network."""
        return float(self.error.sum())

    @property
    def total_bound(self) -> float:
        """The bound's sum; [KFAC, sec. 3.1] reports 4134.6."""
        return float(self.bound.sum())


def pair_cumulants(found: Pass, i: str, j: str) -> PairCumulants:
    """The cumulants of two layers' blocks; needs memory for several matrices of the block's size.

    Args:
        found: of :func:`natgrad.diagnostics.exact_pass`.
        i: name of the layer of the rows.
        j: that of the columns.
    """
    a, b = found.inputs[i], found.inputs[j]
    n, shape = len(a), (a.shape[1], found.derivatives[i].shape[2], b.shape[1], found.derivatives[j].shape[2])
    gg = torch.einsum("knp,knq->npq", found.derivatives[i], found.derivatives[j]).reshape(n, -1) * found.scale
    mean_a, mean_b, mean_gg = a.mean(0), b.mean(0), gg.mean(0)

    def moment(left: Tensor, right: Tensor) -> Tensor:
        """``E[left right g gᵀ]`` as [in_i, out_i, in_j, out_j]."""
        products = torch.einsum("np,nq->npq", left, right).reshape(n, -1)
        return (products.T @ gg / n).reshape(left.shape[1], right.shape[1], shape[1], shape[3]).permute(0, 2, 1, 3)

    def split(left: Tensor, right: Tensor) -> Tensor:
        """``E[left right] E[g gᵀ]`` likewise."""
        G = mean_gg.reshape(shape[1], shape[3])
        return torch.einsum("pq,rs->prqs", left.T @ right / n, G)

    centred_a, centred_b = a - mean_a, b - mean_b
    fourth = moment(centred_a, centred_b) - split(centred_a, centred_b)
    third_b = (centred_b.T @ gg / n).reshape(shape[2], shape[1], shape[3])  # κ(a2, g1, g2)
    third_a = (centred_a.T @ gg / n).reshape(shape[0], shape[1], shape[3])
    return PairCumulants(
        fourth,
        torch.einsum("p,qrs->prqs", mean_a, third_b),
        torch.einsum("q,prs->prqs", mean_b, third_a),
        moment(a, b) - split(a, b),
    )


def cumulant_report(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    *,
    layers: tuple[str, ...] | None = None,
    y: Any = None,
    forward: Forward | None = None,
) -> CumulantReport:
    """The total absolute error of F̃ and its bound from the higher cumulants, per pair of layers and in total.

    Args:
        model: a model of ``nn.Linear`` layers, each used once per example.
        likelihood: p(y | z); the scale is that of its ``nll``.
        x: one batch.
        layers: names of the layers to look at; all by default. Figure 2 of [KFAC] shows the middle four of six.
        y: targets, where the curvature depends on them.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Raises:
        ValueError: an unknown layer, or as :func:`natgrad.diagnostics.exact_pass`.
    """
    found = exact_pass(model, likelihood, x, y=y, forward=forward)
    names = tuple(found.inputs) if layers is None else tuple(layers)
    unknown = [name for name in names if name not in found.inputs]
    if unknown:
        raise ValueError(f"layers: {unknown} are none of this model's layers {list(found.inputs)}")
    error = found.z.new_zeros(len(names), len(names))
    bound = error.clone()
    for row, i in enumerate(names):
        for column, j in enumerate(names[: row + 1]):
            pair = pair_cumulants(found, i, j)
            error[row, column] = error[column, row] = pair.error.abs().sum()
            bound[row, column] = bound[column, row] = pair.bound.sum()
    return CumulantReport(names, error, bound)
