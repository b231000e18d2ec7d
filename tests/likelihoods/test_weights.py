"""Weights, masks and normalisers: values against explicit sums, curvature against the Hessian of those sums."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import natgrad as ng

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.3], dtype=torch.float64)
MASK = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A likelihood with targets and weights, and its weighted nll per target on paper, summed; and the divisor."""

    likelihood: Any
    z: Tensor
    y: Tensor
    weight: Tensor | None
    summed: Any
    count: float


def _log_p(z: Tensor, dim: int = -1) -> Tensor:
    return z - z.exp().sum(dim, keepdim=True).log()


def _cross_entropy(z: Tensor, soft: Tensor, classes: Tensor, positions: Any = 1.0, dim: int = -1) -> Tensor:
    """``−Σ w_n Σ_c class_weight_c ỹ_c log p_c``."""
    return -(positions * (classes * soft * _log_p(z.movedim(dim, -1))).sum(-1)).sum()


def _onehot(y: Tensor, classes: int = 4) -> Tensor:
    return (y.unsqueeze(-1) == torch.arange(classes)).double()


def _cases() -> dict[str, Case]:
    z, y = _normal(3, 4), torch.tensor([1, 3, 0])
    real, soft = _normal(3, 4, seed=1), _rand(3, 4)
    element = _rand(3, 4, seed=2)
    one = torch.ones(4, dtype=torch.float64)
    softmax = torch.softmax(_normal(3, 4, seed=3), -1)
    smooth = 0.9 * _onehot(y) + 0.1 / 4
    spatial, labels = _normal(2, 4, 3), torch.tensor([[0, 1, -100], [3, 3, 2]])
    kept = (labels != -100).double()
    onehot = _onehot(labels)
    holes = torch.tensor([1, 2, 0])
    per_position, spatial_soft = _rand(2, 3, seed=5), torch.softmax(_normal(2, 4, 3, seed=6), 1)
    p = 1 / (1 + torch.exp(-z))
    positive, negative = -(soft * p.log()), -((1 - soft) * (1 - p).log())
    C, B, G, P = ng.Categorical, ng.Bernoulli, ng.Gaussian, ng.Poisson

    def bce(pos_weight: Any = 1.0, weight: Any = 1.0) -> Any:
        def summed(z: Tensor) -> Tensor:
            p = 1 / (1 + torch.exp(-z))
            return -(weight * (pos_weight * soft * p.log() + (1 - soft) * (1 - p).log())).sum()

        return summed

    assert torch.allclose(bce()(z), (positive + negative).sum())
    return {
        "gaussian, example weights": Case(
            G(0.5, "element"), z, real, MASK, lambda z: (MASK[:, None] * (z - real) ** 2).sum(), 8
        ),
        "gaussian, element weights": Case(G(2.0), z, real, element, lambda z: (element * (z - real) ** 2).sum() / 4, 3),
        "gaussian, sum": Case(G(1.0, "none"), z, real, element, lambda z: (element * (z - real) ** 2).sum() / 2, 1),
        "bernoulli, mask": Case(B("element"), z, soft, MASK, bce(weight=MASK[:, None]), 8),
        "bernoulli, pos_weight": Case(B("element", pos_weight=3 * one), z, soft, None, bce(pos_weight=3.0), 12),
        "bernoulli, pos_weight per output": Case(
            B(pos_weight=CLASS_WEIGHT), z, soft, None, bce(pos_weight=CLASS_WEIGHT), 3
        ),
        "bernoulli, every weight": Case(
            B("none", pos_weight=CLASS_WEIGHT, weight=CLASS_WEIGHT.flip(0)),
            z,
            soft,
            element,
            bce(CLASS_WEIGHT, CLASS_WEIGHT.flip(0) * element),
            1,
        ),
        "poisson, element weights": Case(
            P("element"),
            z,
            torch.round(3 * soft),
            element,
            lambda z: (element * (z.exp() - (3 * soft).round() * z)).sum(),
            12,
        ),
        "categorical, mask": Case(C("element"), z, y, MASK, lambda z: _cross_entropy(z, _onehot(y), one, MASK), 2),
        "categorical, example weights": Case(
            C(), z, y, MASK * 0.3, lambda z: _cross_entropy(z, _onehot(y), one, MASK * 0.3), 3
        ),
        "categorical, class weights": Case(
            C("none", class_weight=CLASS_WEIGHT), z, y, None, lambda z: _cross_entropy(z, _onehot(y), CLASS_WEIGHT), 1
        ),
        "categorical, weighted mean": Case(
            C("weighted", class_weight=CLASS_WEIGHT),
            z,
            y,
            None,
            lambda z: _cross_entropy(z, _onehot(y), CLASS_WEIGHT),
            3.8,
        ),
        "categorical, weighted mean with example weights": Case(
            C("weighted", class_weight=CLASS_WEIGHT),
            z,
            y,
            MASK,
            lambda z: _cross_entropy(z, _onehot(y), CLASS_WEIGHT, MASK),
            2.5,
        ),
        "categorical, ignored": Case(
            C("element", ignore_index=2),
            z,
            holes,
            None,
            lambda z: _cross_entropy(z, _onehot(holes), one, (holes != 2).double()),
            2,
        ),
        "categorical, smoothed": Case(C(label_smoothing=0.1), z, y, None, lambda z: _cross_entropy(z, smooth, one), 3),
        "categorical, smoothed with class weights": Case(
            C("weighted", class_weight=CLASS_WEIGHT, label_smoothing=0.1),
            z,
            y,
            None,
            lambda z: _cross_entropy(z, smooth, CLASS_WEIGHT),
            3.8,
        ),
        "categorical, probabilities": Case(
            C("element"), z, softmax, None, lambda z: _cross_entropy(z, softmax, one), 3
        ),
        "categorical, probabilities with everything": Case(
            C("weighted", class_weight=CLASS_WEIGHT, label_smoothing=0.1),
            z,
            softmax,
            None,
            lambda z: _cross_entropy(z, 0.9 * softmax + 0.1 / 4, CLASS_WEIGHT),
            3,
        ),
        "categorical, classes first with holes": Case(
            C("element", class_dim=1), spatial, labels, None, lambda z: _cross_entropy(z, onehot, one, kept, 1), 5
        ),
        "categorical, classes first with everything": Case(
            C("weighted", class_dim=1, class_weight=CLASS_WEIGHT, label_smoothing=0.2),
            spatial,
            labels,
            None,
            lambda z: _cross_entropy(z, 0.8 * onehot + 0.05, CLASS_WEIGHT, kept, 1),
            0.5 + 2.0 + 1.3 + 1.3,
        ),
        "categorical, classes first, weights per position": Case(
            C("element", class_dim=1),
            spatial,
            labels,
            per_position,
            lambda z: _cross_entropy(z, onehot, one, kept * per_position, 1),
            5,
        ),
        "categorical, classes first, weights per example": Case(
            C("example", class_dim=1),
            spatial,
            labels,
            torch.tensor([0.5, 2.0], dtype=torch.float64),
            lambda z: _cross_entropy(z, onehot, one, kept * torch.tensor([[0.5], [2.0]]), 1),
            2,
        ),
        "categorical, classes first, probabilities": Case(
            C("element", class_dim=1, class_weight=CLASS_WEIGHT),
            spatial,
            spatial_soft,
            None,
            lambda z: _cross_entropy(z, spatial_soft.movedim(1, -1), CLASS_WEIGHT, dim=1),
            6,
        ),
    }


CASES = _cases()


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_value_and_count(case: Case) -> None:
    count = case.likelihood.count(case.z, case.y, case.weight)
    torch.testing.assert_close(count, torch.tensor(float(case.count), dtype=torch.float64))
    torch.testing.assert_close(
        case.likelihood.nll(case.z, case.y, weight=case.weight), case.summed(case.z) / case.count
    )
    torch.testing.assert_close(case.likelihood.nll(case.z, case.y, weight=case.weight, count=1), case.summed(case.z))


def test_gradient(case: Case) -> None:
    gradient = torch.func.grad(lambda z: case.likelihood.nll(z, case.y, weight=case.weight))(case.z)
    torch.testing.assert_close(gradient, torch.func.grad(case.summed)(case.z) / case.count)


def test_weighted_fisher_is_the_hessian(case: Case) -> None:
    """In its natural parameters every built-in nll has the Hessian ``w F_R / count``, whatever the targets."""
    size = case.z.numel()
    hessian = torch.func.hessian(lambda z: case.summed(z.reshape(case.z.shape)))(case.z.flatten())
    units = torch.eye(size, dtype=torch.float64).reshape(size, *case.z.shape)
    products = case.likelihood.fisher_product(case.z, units)
    weight = case.likelihood.curvature_weight(case.z, case.y, case.weight)
    if weight is not None:
        assert weight.ndim == case.z.ndim and weight.dtype == case.z.dtype
        products = products * weight
    torch.testing.assert_close(products.reshape(size, size), hessian)


def test_weighted_samples_have_the_weighted_fisher(case: Case) -> None:
    """Scores of drawn targets times √w: their mean outer product estimates the Hessian of the sum."""
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    weight = case.likelihood.curvature_weight(case.z, case.y, case.weight)
    root = torch.ones(1, dtype=torch.float64) if weight is None else weight.sqrt()
    z = case.z[:1].expand(draws, *case.z.shape[1:])
    s = case.likelihood.score(z, case.likelihood.sample(z, generator)) * root[:1]
    products = torch.einsum("ni,nj->nij", s.flatten(1), s.flatten(1))
    size = case.z[0].numel()
    hessian = torch.func.hessian(lambda z: case.summed(z.reshape(case.z.shape)))(case.z.flatten())[:size, :size]
    error = (products.mean(0) - hessian).abs()
    assert bool((error <= 5 * products.std(0) / draws**0.5 + 1e-12).all())


def test_needs_targets_tells_whether_the_curvature_weight_asks(case: Case) -> None:
    if case.likelihood.needs_targets:
        with pytest.raises(ValueError, match="y="):
            case.likelihood.curvature_weight(case.z, None, case.weight)
    else:
        case.likelihood.curvature_weight(case.z, None, case.weight)


@pytest.mark.parametrize(
    ("likelihood", "needs"),
    [
        (ng.Gaussian(), False),
        (ng.Bernoulli(weight=CLASS_WEIGHT), False),
        (ng.Bernoulli(pos_weight=CLASS_WEIGHT), True),
        (ng.Categorical(label_smoothing=0.1), False),
        (ng.Categorical(class_weight=CLASS_WEIGHT), True),
        (ng.Categorical(ignore_index=0), True),
        (ng.Categorical("weighted"), True),
        (ng.Poisson(), False),
    ],
)
def test_needs_targets(likelihood: Any, needs: bool) -> None:
    assert likelihood.needs_targets is needs
    model, x = torch.nn.Linear(2, 4).double(), _normal(3, 2)
    if needs:
        with pytest.raises(ValueError, match="y"):
            ng.Fisher(model, likelihood, x)
    else:
        ng.Fisher(model, likelihood, x)


def test_all_targets_ignored_is_nan_as_in_torch() -> None:
    y = torch.full((3,), -100)
    ours = ng.Categorical("element", class_dim=1).nll(_normal(3, 4), y)
    assert ours.isnan() and torch.nn.CrossEntropyLoss()(_normal(3, 4), y).isnan()


def test_bool_masks_are_weights() -> None:
    z, y, mask = _normal(3, 4), _normal(3, 4, seed=1), MASK.bool()
    likelihood = ng.Gaussian(normalizer="element")
    torch.testing.assert_close(likelihood.nll(z, y, weight=mask), likelihood.nll(z[mask], y[mask]))
    torch.testing.assert_close(likelihood.curvature_weight(z, y, mask), MASK[:, None])


def test_weights_follow_the_dtype_of_z() -> None:
    z, y = _normal(3, 4), torch.tensor([1, 3, 0])
    single = ng.Categorical("weighted", class_weight=CLASS_WEIGHT.float())
    double = ng.Categorical("weighted", class_weight=CLASS_WEIGHT.float().double())
    torch.testing.assert_close(single.nll(z, y), double.nll(z, y))
    assert single.curvature_weight(z, y).dtype == torch.float64
    bernoulli = ng.Bernoulli(pos_weight=CLASS_WEIGHT, weight=CLASS_WEIGHT)
    z32, soft = z.float(), _rand(3, 4).float()
    assert bernoulli.nll(z32, soft).dtype == bernoulli.curvature_weight(z32, soft).dtype == torch.float32


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weight_dims=st.integers(0, 4),
    normalizer=st.sampled_from(["example", "element", "none"]),
    family=st.sampled_from([ng.Gaussian, ng.Bernoulli, ng.Poisson]),
)
def test_any_shape_and_leading_weight(shape: list[int], weight_dims: int, normalizer: str, family: Any) -> None:
    """The nll is additive over examples, and a weight of fewer dimensions is broadcast from the left."""
    likelihood, z, y = family(normalizer=normalizer), _normal(*shape), _rand(*shape)
    weight = _rand(*shape[:weight_dims], seed=2) if weight_dims <= len(shape) else _rand(*shape, seed=2)
    full = weight.reshape(*weight.shape, *[1] * (z.ndim - weight.ndim)).expand_as(z)
    torch.testing.assert_close(likelihood.nll(z, y, weight=weight), likelihood.nll(z, y, weight=full.contiguous()))
    parts = [likelihood.nll(z[n : n + 1], y[n : n + 1], weight=full[n : n + 1], count=1) for n in range(shape[0])]
    count = {"example": shape[0], "element": z.numel(), "none": 1}[normalizer]
    torch.testing.assert_close(likelihood.nll(z, y, weight=weight), sum(parts) / count)
    assert likelihood.fisher_factor(z).shape == (*shape, z[0].numel())
    assert likelihood.fisher_product(z, z.expand(2, 3, *shape)).shape == (2, 3, *shape)


@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 4),
    positions=st.lists(st.integers(1, 3), max_size=2),
    dim=st.integers(1, 3),
    from_the_end=st.booleans(),
)
def test_any_class_dimension(batch: int, classes: int, positions: list[int], dim: int, from_the_end: bool) -> None:
    """Moving the class dimension moves everything with it."""
    dim = min(dim, len(positions) + 1)
    last, z = ng.Categorical("element"), _normal(batch, *positions, classes)
    moved = ng.Categorical("element", class_dim=dim - z.ndim if from_the_end else dim)
    zm = z.movedim(-1, dim)
    y = torch.randint(classes, (batch, *positions), generator=torch.Generator().manual_seed(0))
    v = _normal(*z.shape, seed=1)
    torch.testing.assert_close(moved.nll(zm, y), last.nll(z, y))
    torch.testing.assert_close(moved.score(zm, y), last.score(z, y).movedim(-1, dim))
    torch.testing.assert_close(moved.fisher_product(zm, v.movedim(-1, dim)), last.fisher_product(z, v).movedim(-1, dim))
    torch.testing.assert_close(moved.fisher_factor(zm), last.fisher_factor(z).movedim(-2, dim))
    torch.testing.assert_close(moved.to_mean(zm), last.to_mean(z).movedim(-1, dim))
    assert moved.sample(zm, torch.Generator().manual_seed(0)).shape == y.shape
