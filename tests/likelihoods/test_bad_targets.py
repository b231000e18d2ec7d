"""What does not fit is refused by name; extreme logits stay finite."""

from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad as ng

Z = torch.zeros(3, 4, dtype=torch.float64)
CLASSES = torch.tensor([0, 3, 1])
FAMILIES = [ng.Gaussian(), ng.Bernoulli(), ng.Poisson(), ng.Categorical()]


def _targets(likelihood: Any) -> Tensor:
    return CLASSES if isinstance(likelihood, ng.Categorical) else torch.zeros_like(Z)


@pytest.mark.parametrize("likelihood", FAMILIES, ids=lambda lik: type(lik).__name__)
class TestEveryFamily:
    def test_shape(self, likelihood: Any) -> None:
        y = _targets(likelihood)
        with pytest.raises(ValueError, match=r"targets: expected shape .*; got \(2"):
            likelihood.nll(Z, y[:2])

    def test_a_column_does_not_broadcast(self, likelihood: Any) -> None:
        y = CLASSES[:, None] if isinstance(likelihood, ng.Categorical) else torch.zeros(3, 1, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"targets: expected shape .*; got \(3, 1\)"):
            likelihood.nll(Z, y)

    @pytest.mark.parametrize("dtype", [torch.complex64])
    def test_dtype(self, likelihood: Any, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match="targets: .*complex64"):
            likelihood.nll(Z, _targets(likelihood).to(dtype))

    def test_device(self, likelihood: Any) -> None:
        with pytest.raises(ValueError, match="targets: on meta.*cpu"):
            likelihood.nll(Z, _targets(likelihood).to("meta"))

    def test_not_a_tensor(self, likelihood: Any) -> None:
        with pytest.raises(TypeError, match="targets: .*list"):
            likelihood.nll(Z, _targets(likelihood).tolist())

    def test_empty_batch(self, likelihood: Any) -> None:
        with pytest.raises(ValueError, match=r"z: the batch is empty .*\(0, 4\)"):
            likelihood.nll(Z[:0], _targets(likelihood)[:0])

    @pytest.mark.parametrize(
        ("weight", "error", "message"),
        [
            (torch.ones(2), ValueError, r"weight: shape \(2,\)"),
            (torch.ones(3, 4, 1), ValueError, r"weight: shape \(3, 4, 1\)"),
            (torch.ones(3, device="meta"), ValueError, "weight: on meta"),
            ([1.0, 1.0, 1.0], TypeError, "weight: .*list"),
        ],
    )
    def test_weight(self, likelihood: Any, weight: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            likelihood.nll(Z, _targets(likelihood), weight=weight)
        with pytest.raises(error, match=message):
            likelihood.curvature_weight(Z, _targets(likelihood), weight)

    def test_normalizer(self, likelihood: Any) -> None:
        with pytest.raises(ValueError, match="normalizer='mean'.*'example', 'element', 'none'"):
            type(likelihood)(normalizer="mean")

    def test_repr_names_the_normalizer(self, likelihood: Any) -> None:
        assert repr(likelihood).startswith(type(likelihood).__name__) and "normalizer='example'" in repr(likelihood)

    def test_a_nan_batch_raises_nowhere(self, likelihood: Any) -> None:
        """Optimisers skip it, so nothing on the way may raise; the loss tells."""
        z = torch.full_like(Z, torch.nan)
        y = _targets(likelihood)
        assert likelihood.nll(z, y).isnan()
        likelihood.validate(z, y)
        likelihood.score(z, likelihood.sample(z, torch.Generator().manual_seed(0)))
        if y.is_floating_point():
            likelihood.validate(Z, torch.full_like(Z, torch.nan))


@pytest.mark.parametrize("likelihood", [ng.Gaussian(), ng.Bernoulli()], ids=lambda lik: type(lik).__name__)
def test_integers_for_real_targets(likelihood: Any) -> None:
    with pytest.raises(ValueError, match="targets: .*floating-point.*int64"):
        likelihood.nll(Z, Z.long())


def test_other_dtypes_that_are_targets() -> None:
    y = torch.tensor([[0, 1, 1, 0]] * 3)
    z = Z + 0.3
    torch.testing.assert_close(ng.Bernoulli().nll(z, y.bool()), ng.Bernoulli().nll(z, y.double()))
    torch.testing.assert_close(ng.Bernoulli().score(z, y.bool()), ng.Bernoulli().score(z, y.double()))
    ng.Bernoulli().validate(z, y.bool())
    torch.testing.assert_close(ng.Poisson().nll(z, y), ng.Poisson().nll(z, y.double()))
    with pytest.raises(ValueError, match="bool"):
        ng.Poisson().nll(z, y.bool())


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0])
def test_bernoulli_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"targets: Bernoulli expects values in \[0, 1\]"):
        ng.Bernoulli().validate(Z, torch.full_like(Z, value))


def test_poisson_range() -> None:
    with pytest.raises(ValueError, match="targets: Poisson expects counts of at least 0; got -2"):
        ng.Poisson().validate(Z, torch.full_like(Z, -2.0))


@pytest.mark.parametrize("wrong", [4, -1, -100])
def test_class_range(wrong: int) -> None:
    likelihood = ng.Categorical(ignore_index=-7)
    y = torch.tensor([0, wrong, -7])
    for check in (likelihood.validate, likelihood.nll):
        with pytest.raises(ValueError, match=rf"targets: .*{wrong}.*expected classes from 0 to 3"):
            check(Z, y)
    likelihood.validate(Z, torch.tensor([0, 3, -7]))


def test_class_probabilities_sum_to_one() -> None:
    y = torch.full_like(Z, 0.25)
    ng.Categorical().validate(Z, y)
    for wrong in (2 * y, y - torch.tensor([0.5, 0, 0, -0.5])):
        with pytest.raises(ValueError, match="targets: Categorical expects probabilities that sum to 1"):
            ng.Categorical().validate(Z, wrong)
    with pytest.raises(ValueError, match="ignore_index"):
        ng.Categorical(ignore_index=0).nll(Z, y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_class_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="targets: .*torch.long"):
        ng.Categorical().nll(Z, torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match="targets: .*torch.long"):
        ng.Categorical().nll(Z, torch.zeros(3))


def test_class_dimension() -> None:
    with pytest.raises(ValueError, match="class_dim=0"):
        ng.Categorical(class_dim=0)
    for class_dim in (2, -2, -3):
        with pytest.raises(ValueError, match=rf"z: shape \(3, 4\) has no class dimension {class_dim}"):
            ng.Categorical(class_dim=class_dim).nll(Z, CLASSES)
    with pytest.raises(ValueError, match="classes in dimension 1"):
        ng.Categorical(class_dim=1).nll(torch.zeros(3, 4, 2), torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"z: Categorical expects \[batch, ..., classes\]"):
        ng.Categorical().nll(torch.zeros(3), CLASSES)


def test_curvature_checks_the_targets_too() -> None:
    likelihood = ng.Categorical(class_weight=torch.ones(4))
    for call in (likelihood.curvature_weight, likelihood.count):
        with pytest.raises(ValueError, match="targets: expected shape"):
            call(Z, CLASSES[:2])
    with pytest.raises(ValueError, match="targets: expected shape"):
        ng.Bernoulli(pos_weight=torch.ones(4)).curvature_weight(Z, Z[:2])


def test_counts_that_depend_on_targets_ask_for_them() -> None:
    for likelihood in (ng.Categorical("weighted"), ng.Categorical("element", ignore_index=0)):
        with pytest.raises(ValueError, match="y="):
            likelihood.count(Z)
    assert ng.Categorical("element").count(Z) == 3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda w: ng.Categorical(class_weight=w), "class_weight"),
        (lambda w: ng.Bernoulli(pos_weight=w), "pos_weight"),
        (lambda w: ng.Bernoulli(weight=w), "weight"),
    ],
)
def test_own_weights(make: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: .*float"):
        make(0.5)
    with pytest.raises(ValueError, match=f"{name}: .*-1"):
        make(torch.tensor([1.0, -1.0]))
    likelihood = make(torch.ones(3))
    with pytest.raises(ValueError, match=rf"{name}: .*\(3,\)"):
        likelihood.nll(Z, _targets(likelihood))
    with pytest.raises(ValueError, match=rf"{name}: .*\(3,\)"):
        likelihood.curvature_weight(Z, _targets(likelihood))


def test_settings() -> None:
    for variance in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="variance"):
            ng.Gaussian(variance)
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match="label_smoothing"):
            ng.Categorical(label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "likelihood", [ng.Gaussian(), ng.Bernoulli(), ng.Categorical()], ids=lambda k: type(k).__name__
)
def test_extreme_outputs(likelihood: Any, dtype: torch.dtype) -> None:
    z = torch.tensor([[1000.0, -1000.0, 0.0], [-1000.0, -1000.0, -1000.0]], dtype=dtype)
    y = torch.tensor([1, 2]) if isinstance(likelihood, ng.Categorical) else torch.tensor([[0.0, 1, 1], [1, 0, 0.5]])
    y = y.to(dtype) if y.is_floating_point() else y
    leaf = z.clone().requires_grad_()
    loss = likelihood.nll(leaf, y)
    loss.backward()
    sample = likelihood.sample(z, torch.Generator().manual_seed(0))
    v = torch.ones_like(z)
    for value in (loss, leaf.grad, likelihood.score(z, sample), sample, likelihood.fisher_product(z, v)):
        assert bool(value.isfinite().all())
    factor = likelihood.fisher_factor(z)
    assert bool(factor.isfinite().all())
    if isinstance(likelihood, ng.Bernoulli):
        torch.testing.assert_close(
            likelihood.nll(z, y, count=1).double(), torch.tensor(3000 + 0.6931471805599453 + 500).double()
        )
        assert sample[0].tolist()[:2] == [1.0, 0.0]
    if isinstance(likelihood, ng.Categorical):
        torch.testing.assert_close(
            likelihood.nll(z, y, count=1).double(), torch.tensor(2000 + 1.0986122886681098).double()
        )
        assert int(sample[0]) == 0


def test_extreme_rates() -> None:
    z = torch.tensor([[-1000.0, 30.0]], dtype=torch.float64)
    likelihood = ng.Poisson()
    sample = likelihood.sample(z, torch.Generator().manual_seed(0))
    assert sample[0, 0] == 0 and abs(sample[0, 1] / z[0, 1].exp() - 1) < 1e-5
    assert likelihood.fisher_product(z, torch.ones_like(z)).tolist() == [[0.0, z[0, 1].exp().item()]]
