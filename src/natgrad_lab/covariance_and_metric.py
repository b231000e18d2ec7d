r"""How far the covariance of gradients is from the metric: the argument of [NATGRAD, sec. 4.1], made measurable.

U is the second moment of the gradients with the targets of the data, G the metric, which takes the expectation over the
model's own targets: ``U = 1/n Σ_i g_i g_iᵀ`` and ``G = 1/n Σ_i J_iᵀ F_R(z_i) J_i``. Both are handled through the inner
products of the vectors that they are sums of, n for U and n · o for G with o outputs; neither is ever written out.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.curvature.gradient_rows import GradientRows
from natgrad.curvature.per_example import PerExampleGradients
from natgrad.likelihoods import Bernoulli, Likelihood
from natgrad.model_view import Forward, ModelView
from natgrad.operators.gradient_moments import check_examples_apart
from natgrad.operators.sandwich import check_likelihood


@dataclass(frozen=True)
class Comparison:
    """U and G of one batch.

    Attributes:
        of_u: the eigenvalues of U that may differ from zero, n of them, in descending order.
        of_g: those of G, n · o of them.
        distance: ``‖U − G‖ / ‖G‖`` in the Frobenius norm.
        resolution: an eigenvalue counts where it is above this many times the number of them, as a share of the
            largest; less precise numbers have a coarser one.
    """

    of_u: Float[Tensor, " n"]
    of_g: Float[Tensor, " k"]
    distance: float
    resolution: float = 1e-10

    @property
    def rank_u(self) -> int:
        """The numerical rank of U: at most n."""
        return _rank(self.of_u, self.resolution)

    @property
    def rank_g(self) -> int:
        """The numerical rank of G: at most n · o; n (o − 1) for classes, whose probabilities sum to 1."""
        return _rank(self.of_g, self.resolution)


class _Linear:
    """The "loss" ``z · c``: its gradients are ``J_iᵀ c_i``."""

    def nll(self, z: Tensor, y: Any, *, weight: Tensor | None = None, count: Any = 1) -> Tensor:
        return (z * y).sum() / count


def compare(
    model: nn.Module,
    likelihood: Likelihood,
    x: Any,
    y: Any,
    *,
    forward: Forward | None = None,
) -> Comparison:
    """Spectra of U and G for one batch, and the distance between the two.

    Args:
        model: the model.
        likelihood: p(y|z).
        x: the inputs.
        y: the targets, for U.
        forward: ``forward(model, x) → z`` where the default call convention does not fit.

    Raises:
        ValueError: the examples depend on each other (batch normalisation in train mode).
        TypeError: the likelihood has no metric.
    """
    uu, gg, ug = _products(model, likelihood, x, y, forward)
    eps = torch.finfo(ModelView(model, forward).dtype).eps
    return Comparison(_spectrum(uu), _spectrum(gg), _distance(uu, gg, ug), max(1e-10, eps))


def distance(model: nn.Module, likelihood: Likelihood, x: Any, y: Any, *, forward: Forward | None = None) -> float:
    """``‖U − G‖ / ‖G‖`` alone: without the spectra, it takes batches ten times as large. Arguments as for `compare`."""
    return _distance(*_products(model, likelihood, x, y, forward))


@dataclass(frozen=True)
class Approach:
    """One point of `approach`.

    Attributes:
        share: how far the model's parameters are on the way to the teacher's, 0 to 1.
        examples: n.
        distance: ``‖U − G‖ / ‖G‖``.
    """

    share: float
    examples: int
    distance: float


def approach(
    model: nn.Module,
    teacher: nn.Module,
    likelihood: Likelihood,
    x: Tensor,
    *,
    shares: Sequence[float] = (0.0, 0.5, 1.0),
    sizes: Sequence[int] = (30, 100, 300),
    seed: int = 0,
) -> list[Approach]:
    """``‖U − G‖ / ‖G‖`` as p approaches q, and as n grows: targets are drawn from a teacher's known q(t|x).

    The model's parameters move on a straight line to the teacher's. Only at its end, where p = q, does the distance
    fall to 0 with n (as 1/√n); before it stops at what the difference between p and q leaves.

    Args:
        model: where p starts; not changed.
        teacher: of the same architecture.
        likelihood: p(y|z).
        x: inputs, at least as many as the largest size.
        shares: of the way.
        sizes: numbers n of examples.
        seed: of the teacher's draws.

    Raises:
        ValueError: fewer inputs than the largest size.
    """
    if max(sizes) > len(x):
        raise ValueError(f"x: {len(x)} inputs for sizes up to {max(sizes)}; pass more inputs or smaller sizes")
    generator = torch.Generator(device=x.device).manual_seed(seed)
    with torch.no_grad():
        y = likelihood.sample(teacher(x), generator=generator)
    found = []
    for share in shares:
        between = copy.deepcopy(model)
        with torch.no_grad():
            for p, end in zip(between.parameters(), teacher.parameters(), strict=True):
                p.lerp_(end, share)
        found += [Approach(share, n, distance(between, likelihood, x[:n], y[:n])) for n in sizes]
    return found


def deterministic_ratio(p: float) -> float:
    """``U / G`` of a logistic model that gives the only label that ever occurs the probability p, measured.

    With deterministic labels U is no estimate of G, however good the model: ``U / G = (1 − p)² / (p (1 − p)) = (1 −
    p) / p``, which goes to 0 as the model improves (and not to 1, as for labels drawn from the model).

    Raises:
        ValueError: p is not between 0 and 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"p={p}: expected a probability between 0 and 1")
    model = nn.utils.skip_init(nn.Linear, 1, 1, bias=False, dtype=torch.float64)
    nn.utils.vector_to_parameters(torch.logit(torch.tensor([p], dtype=torch.float64)), model.parameters())
    x = torch.ones(4, 1, dtype=torch.float64)
    found = compare(model, Bernoulli(), x, torch.ones_like(x))
    return float(found.of_u[0] / found.of_g[0])


def _products(
    model: nn.Module, likelihood: Likelihood, x: Any, y: Any, forward: Forward | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products, divided by n: of the vectors in U, of those in G, and of the former with the latter."""
    check_likelihood(likelihood)
    view = ModelView(model, forward)
    check_examples_apart(view, "U")
    same = view.snapshot()  # one function throughout: dropout draws the same masks
    collect = PerExampleGradients(view)
    with same:
        passed = collect(likelihood, x, y)
    g = passed.rows
    metric: GradientRows | None = None
    for column in likelihood.fisher_factor(passed.z).unbind(-1):
        with same:
            rows = collect(_Linear(), x, column).rows  # type: ignore[bad-argument-type]  # all that it needs is nll
        metric = rows if metric is None else metric.append(rows)
    if metric is None:
        raise ValueError(f"likelihood: {type(likelihood).__name__}.fisher_factor returned no columns: no metric")
    uu, gg, ug = (product.double() / len(g) for product in (g.gram(), metric.gram(), g.gram(metric)))
    return uu, gg, ug


def _distance(uu: Tensor, gg: Tensor, ug: Tensor) -> float:
    # ‖Σ_i a_i a_iᵀ − Σ_j b_j b_jᵀ‖² is made of squared inner products
    squared = uu.square().sum() + gg.square().sum() - 2 * ug.square().sum()
    return float((squared.clamp(min=0) / gg.square().sum()).sqrt())


def _spectrum(product: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    return torch.linalg.eigvalsh(product).clamp(min=0).flip(0)


def _rank(eigenvalues: Float[Tensor, " n"], resolution: float) -> int:
    # Gram matrices square the condition
    return int((eigenvalues > resolution * len(eigenvalues) * eigenvalues[0]).sum()) if len(eigenvalues) else 0
