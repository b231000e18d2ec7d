"""Exact operators against definitions written out: networks, families, normalisers, weights, parametrisations."""

import pytest
import torch
from oracles import dense as oracle
from oracles import networks
from torch import Tensor, nn

import natgrad.likelihoods as lik
from natgrad.model_view import call_model
from natgrad.operators.autodiff import EmpiricalFisher, Fisher, GaussNewton, GradientCovariance, Hessian, Jacobian
from natgrad.operators.base import vec_order

FAMILIES = ("gaussian", "bernoulli", "categorical")
NORMALIZERS = ("example", "element", "none")
VARIANCE = 0.7


def likelihood(family: str, normalizer: str = "example") -> lik.Likelihood:
    if family == "gaussian":
        return lik.Gaussian(VARIANCE, normalizer=normalizer)
    return {"bernoulli": lik.Bernoulli, "categorical": lik.Categorical}[family](normalizer=normalizer)


def _call(case: networks.Case) -> oracle.Call:
    return case.forward or call_model


@pytest.mark.parametrize("name", networks.NAMES)
def test_jacobian(name: str) -> None:
    case = networks.case(name)
    j = Jacobian(case.model, case.x, forward=case.forward)
    torch.testing.assert_close(j.to_dense(), oracle.jacobian(case.model, case.x, _call(case)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", networks.NAMES)
def test_fisher_is_the_enumerated_one_and_equals_gauss_newton(name: str, family: str) -> None:
    case = networks.case(name)
    y, n = networks.targets(family, case.z), case.z.shape[0]
    expected = oracle.fisher_by_enumeration(case.model, case.x, family, variance=VARIANCE, call=_call(case)) / n
    fisher = Fisher(case.model, likelihood(family), case.x, forward=case.forward)
    torch.testing.assert_close(fisher.to_dense(), expected)
    newton = GaussNewton(case.model, likelihood(family), case.x, y, forward=case.forward)
    torch.testing.assert_close(newton.to_dense(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", networks.NAMES)
def test_hessian(name: str, family: str) -> None:
    case = networks.case(name)
    y, n = networks.targets(family, case.z), case.z.shape[0]
    summed, call = oracle.nll(family, VARIANCE), _call(case)
    expected = oracle.hessian(case.model, lambda: summed(call(case.model, case.x), y) / n)
    hessian = Hessian(case.model, likelihood(family), case.x, y, forward=case.forward)
    torch.testing.assert_close(hessian.to_dense(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", networks.NAMES)
def test_per_example_gradients(name: str, family: str) -> None:
    case = networks.case(name)
    y, n = networks.targets(family, case.z), case.z.shape[0]
    g = oracle.per_example_gradients(case.model, case.x, y, oracle.nll(family, VARIANCE), _call(case))
    # Every normaliser: the gradients are those of the example's own summed nll, and the mean is over examples.
    for normalizer in NORMALIZERS:
        arguments = case.model, likelihood(family, normalizer), case.x, y
        torch.testing.assert_close(EmpiricalFisher(*arguments, forward=case.forward).to_dense(), g.T @ g / n)
        covariance = (g - g.mean(0)).T @ (g - g.mean(0)) / n
        torch.testing.assert_close(GradientCovariance(*arguments, forward=case.forward).to_dense(), covariance)
        uncentered = GradientCovariance(*arguments, centered=False, forward=case.forward)
        torch.testing.assert_close(uncentered.to_dense(), g.T @ g / n)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["mlp", "sequence", "batch_of_one"])
def test_probability_parametrisation(name: str, family: str, normalizer: str) -> None:
    case = networks.case(name)
    y, count = networks.targets(family, case.z), oracle.count(family, normalizer, case.z)
    expected = oracle.fisher_by_enumeration(case.model, case.x, family, variance=VARIANCE) / count
    fisher = Fisher(case.model, likelihood(family, normalizer), case.x, parametrization="probabilities")
    torch.testing.assert_close(fisher.to_dense(), expected)
    expected = oracle.gauss_newton_in_probabilities(case.model, case.x, y, family, variance=VARIANCE) / count
    newton = GaussNewton(case.model, likelihood(family, normalizer), case.x, y, linearize="probabilities")
    torch.testing.assert_close(newton.to_dense(), expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scale_is_that_of_nll(family: str, weighted: bool, normalizer: str) -> None:
    case = networks.case("sequence")
    z, y = case.z, networks.targets(family, case.z)
    weight = None
    count = oracle.count(family, normalizer, z)
    if weighted:
        shape = z.shape[:-1] if family == "categorical" else z.shape
        weight = torch.rand(shape, dtype=z.dtype, generator=torch.Generator().manual_seed(5)) + 0.5
        weight[0] = 0  # masked: not counted per element
        count = int((weight != 0).sum()) if normalizer == "element" else count
    summed, distribution = oracle.nll(family, VARIANCE, weight), likelihood(family, normalizer)
    torch.testing.assert_close(distribution.nll(z, y, weight=weight), summed(z, y) / count)
    newton = oracle.gauss_newton(case.model, case.x, lambda u: summed(u, y) / count)
    torch.testing.assert_close(Fisher(case.model, distribution, case.x, y=y, weight=weight).to_dense(), newton)
    torch.testing.assert_close(GaussNewton(case.model, distribution, case.x, y, weight=weight).to_dense(), newton)
    in_probabilities = Fisher(case.model, distribution, case.x, y=y, weight=weight, parametrization="probabilities")
    torch.testing.assert_close(in_probabilities.to_dense(), newton)
    hessian = oracle.hessian(case.model, lambda: summed(case.model(case.x), y) / count)
    torch.testing.assert_close(Hessian(case.model, distribution, case.x, y, weight=weight).to_dense(), hessian)
    rows = [oracle.nll(family, VARIANCE, None if weight is None else weight[i : i + 1]) for i in range(3)]
    g = torch.stack(
        [oracle.flat_gradient(rows[i](case.model(case.x[i : i + 1]), y[i : i + 1]), case.model) for i in range(3)]
    )
    torch.testing.assert_close(
        EmpiricalFisher(case.model, distribution, case.x, y, weight=weight).to_dense(), g.T @ g / 3
    )


CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
TARGETED = {
    "class_weight": lambda: lik.Categorical(class_weight=CLASS_WEIGHT),
    "weighted_mean": lambda: lik.Categorical(normalizer="weighted", class_weight=CLASS_WEIGHT, ignore_index=1),
    "ignore_index": lambda: lik.Categorical(normalizer="element", ignore_index=1),
    "label_smoothing": lambda: lik.Categorical(label_smoothing=0.2),
    "smoothed_class_weight": lambda: lik.Categorical(class_weight=CLASS_WEIGHT, label_smoothing=0.2),
    "pos_weight": lambda: lik.Bernoulli(pos_weight=6 * CLASS_WEIGHT),
    "output_weight": lambda: lik.Bernoulli("element", weight=CLASS_WEIGHT),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TARGETED)
def test_curvature_that_depends_on_the_targets(name: str, weighted: bool) -> None:
    case = networks.case("sequence")
    distribution = TARGETED[name]()
    family = type(distribution).__name__.lower()
    y = networks.targets(family, case.z)
    if family == "categorical":
        y[0, 0] = 1
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64) if weighted else None  # per example
    expected = oracle.gauss_newton(case.model, case.x, lambda u: distribution.nll(u, y, weight=weight))
    torch.testing.assert_close(Fisher(case.model, distribution, case.x, y=y, weight=weight).to_dense(), expected)
    torch.testing.assert_close(GaussNewton(case.model, distribution, case.x, y, weight=weight).to_dense(), expected)
    hessian = oracle.hessian(case.model, lambda: distribution.nll(case.model(case.x), y, weight=weight))
    torch.testing.assert_close(Hessian(case.model, distribution, case.x, y, weight=weight).to_dense(), hessian)
    if distribution.needs_targets:
        with pytest.raises(ValueError, match="y: .*targets"):
            Fisher(case.model, distribution, case.x)


def test_soft_classes() -> None:
    case = networks.case("sequence")
    y = torch.softmax(case.z.sin(), -1)
    distribution = lik.Categorical(class_weight=CLASS_WEIGHT)
    expected = oracle.gauss_newton(case.model, case.x, lambda u: distribution.nll(u, y))
    torch.testing.assert_close(Fisher(case.model, distribution, case.x, y=y).to_dense(), expected)


def test_classes_in_dimension_one() -> None:
    model = nn.Conv1d(2, 3, 1).double()
    x, y = torch.randn(2, 2, 4, dtype=torch.float64), torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    last = Fisher(model, lik.Categorical(), x, forward=lambda m, i: m(i).movedim(1, -1))
    first = Fisher(model, lik.Categorical(class_dim=1), x)
    torch.testing.assert_close(first.to_dense(), last.to_dense())
    newton = GaussNewton(model, lik.Categorical(class_dim=1), x, y, linearize="probabilities")
    moved = GaussNewton(
        model, lik.Categorical(), x, y, linearize="probabilities", forward=lambda m, i: m(i).movedim(1, -1)
    )
    torch.testing.assert_close(newton.to_dense(), moved.to_dense())


def test_saturated_probabilities_stay_finite() -> None:
    model = nn.Linear(1, 2)
    nn.init.constant_(model.weight, 200.0)
    x = torch.tensor([[1.0], [-1.0]])
    for distribution, y in (
        (lik.Bernoulli(), torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
        (lik.Categorical(), torch.tensor([0, 1])),
    ):
        assert Fisher(model, distribution, x, parametrization="probabilities").to_dense().isfinite().all()
        newton = GaussNewton(model, distribution, x, y, linearize="probabilities").to_dense()
        assert newton.isfinite().all()
        if isinstance(distribution, lik.Bernoulli):  # J_fᵀ D J_f → x² where the prediction is certain and wrong
            torch.testing.assert_close(newton[0, 0], torch.tensor(1.0))


class Poisson:
    """A likelihood of a user's own: y ~ Poisson(exp z), with nothing but the protocol."""

    def nll(self, z: Tensor, y: Tensor, *, weight: Tensor | None = None, count: Tensor | None = None) -> Tensor:
        return (z.exp() - y * z).sum() / (self.count(z) if count is None else count)

    def count(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return torch.tensor(float(z.shape[0]), dtype=z.dtype)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(z.exp(), generator)

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return z.exp() * v

    def fisher_factor(self, z: Tensor) -> Tensor:
        return torch.diag_embed((z / 2).exp())


def test_a_likelihood_of_ones_own() -> None:
    case = networks.case("mlp")
    y = torch.poisson(case.z.exp())
    fisher, newton = Fisher(case.model, Poisson(), case.x), GaussNewton(case.model, Poisson(), case.x, y)
    torch.testing.assert_close(fisher.to_dense(), newton.to_dense())
    assert fisher.to_dense().norm() > 0.1
    with pytest.raises(ValueError, match="curvature_weight"):
        Fisher(case.model, Poisson(), case.x, weight=torch.ones_like(y))
    with pytest.raises(TypeError, match="to_mean"):
        Fisher(case.model, Poisson(), case.x, parametrization="probabilities")
    with pytest.raises(ValueError, match="linearize.*Poisson"):
        GaussNewton(case.model, Poisson(), case.x, y, linearize="probabilities")


@pytest.mark.parametrize("name", ["mlp", "no_bias"])
def test_vec_order(name: str) -> None:
    case = networks.case(name)
    order = oracle.vec_order(case.model)
    fisher = Fisher(case.model, lik.Gaussian(), case.x)
    torch.testing.assert_close(fisher.to_dense(order="vec"), fisher.to_dense()[order][:, order])
    jacobian = Jacobian(case.model, case.x)
    torch.testing.assert_close(jacobian.to_dense(order="vec"), jacobian.to_dense()[:, order])
    torch.testing.assert_close(jacobian.T.to_dense(order="vec"), jacobian.to_dense()[:, order].T)


def test_vec_order_of_a_linear_layer_is_a_kronecker_product() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(1, 3, dtype=torch.float64)
    a = torch.cat([x[0], torch.ones(1, dtype=torch.float64)])
    expected = torch.kron(torch.outer(a, a), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(Fisher(layer, lik.Gaussian(), x).to_dense(order="vec"), expected)


def test_vec_order_keeps_other_parameters_after_the_layers() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2, bias=False))
    assert vec_order(Jacobian(model, torch.randn(1, 2)).domain).tolist() == [4, 6, 5, 7, 0, 1, 2, 3]


class Skewed(Poisson):
    """A mean map whose derivative is not symmetric, with the identity as the metric of the means."""

    def to_mean(self, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0].exp() * z[:, 1], z[:, 1].sin()], 1)

    def mean_fisher_product(self, p: Tensor, v: Tensor) -> Tensor:
        return v


def test_the_mean_map_need_not_have_a_symmetric_derivative() -> None:
    case = networks.case("mlp")
    fisher = Fisher(case.model, Skewed(), case.x, parametrization="probabilities")
    j = oracle.jacobian(case.model, case.x, of=Skewed().to_mean)
    torch.testing.assert_close(fisher.to_dense(), j.T @ j / 4)
