"""The built-in likelihoods, and one that follows the protocol alone, against distributions written out on paper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.likelihoods import LikelihoodContract
from oracles import distributions
from oracles.distributions import Twin
from torch import Tensor

import natgrad as ng


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _classes(n: int, *shape: int) -> Tensor:
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalizer", ["example", "element", "none"])
class _BuiltIn(LikelihoodContract):
    shape: tuple[int, ...] = (3, 3)
    make: Callable[[str], Any]

    @pytest.fixture
    def likelihood(self, normalizer: str) -> ng.Likelihood:
        return type(self).make(normalizer)

    @pytest.fixture
    def z(self) -> Tensor:
        return _normal(*self.shape)


class TestGaussian(_BuiltIn):
    make = staticmethod(lambda normalizer: ng.Gaussian(0.3, normalizer))

    @pytest.fixture
    def twin(self) -> Twin:
        return distributions.gaussian(0.3)

    @pytest.fixture
    def y(self) -> Tensor:
        return _normal(*self.shape, seed=1)


class TestGaussianWithPositions(TestGaussian):
    shape = (2, 2, 2)


class TestBernoulli(_BuiltIn):
    make = staticmethod(ng.Bernoulli)

    @pytest.fixture
    def twin(self) -> Twin:
        return distributions.bernoulli()

    @pytest.fixture
    def y(self) -> Tensor:
        return torch.rand(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestBernoulliOfOneOutput(TestBernoulli):
    shape = (4,)


class TestBernoulliWithPositions(TestBernoulli):
    shape = (2, 2, 1)


class TestCategorical(_BuiltIn):
    make = staticmethod(ng.Categorical)

    @pytest.fixture
    def twin(self) -> Twin:
        return distributions.categorical()

    @pytest.fixture
    def y(self) -> Tensor:
        return _classes(self.shape[-1], *self.shape[:-1])


class TestCategoricalWithPositions(TestCategorical):
    shape = (2, 2, 3)


class TestCategoricalWithClassesFirst(_BuiltIn):
    shape = (2, 3, 2)
    make = staticmethod(lambda normalizer: ng.Categorical(normalizer, class_dim=1))

    @pytest.fixture
    def twin(self) -> Twin:
        return distributions.categorical(1)

    @pytest.fixture
    def y(self) -> Tensor:
        return _classes(3, 2, 2)


class TestCategoricalWithClassesBeforeTheLast(_BuiltIn):
    shape = (2, 1, 3, 2)
    make = staticmethod(lambda normalizer: ng.Categorical(normalizer, class_dim=-2))

    @pytest.fixture
    def twin(self) -> Twin:
        return distributions.categorical(-2)

    @pytest.fixture
    def y(self) -> Tensor:
        return _classes(3, 2, 1, 2)


class TestPoisson(_BuiltIn):
    shape = (3, 2)
    make = staticmethod(ng.Poisson)

    @pytest.fixture
    def twin(self) -> Twin:
        return distributions.poisson(40)

    @pytest.fixture
    def z(self) -> Tensor:
        return 0.5 * _normal(*self.shape)

    @pytest.fixture
    def y(self) -> Tensor:
        return _classes(6, *self.shape).double()


class Geometric:
    """``p(y | z) = σ(z)^y σ(−z)``: successes before the first failure. The protocol's five methods alone."""

    def nll(self, z: Tensor, y: Tensor, *, weight: Tensor | None = None, count: Any = None) -> Tensor:
        terms = -y * torch.nn.functional.logsigmoid(z) - torch.nn.functional.logsigmoid(-z)
        return (terms if weight is None else terms * weight).sum() / (self.count(z, y) if count is None else count)

    def count(self, z: Tensor, y: Any = None, weight: Tensor | None = None) -> Tensor:
        return torch.tensor(float(len(z)), dtype=z.dtype, device=z.device)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        uniform = 1 - torch.empty_like(z).uniform_(generator=generator)
        return (uniform.log() / torch.nn.functional.logsigmoid(z.detach())).floor()

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(z) * v  # E[1 + y] σ(z) σ(−z) with E[y] = σ(z) / σ(−z)

    def fisher_factor(self, z: Tensor) -> Tensor:
        return torch.diag_embed(torch.sigmoid(z).sqrt().flatten(1)).reshape(*z.shape, -1)


class TestUsersOwn(LikelihoodContract):
    @pytest.fixture
    def likelihood(self) -> Geometric:
        return Geometric()

    @pytest.fixture
    def twin(self) -> Twin:
        largest = 60

        def outcomes(z: Tensor) -> tuple[Tensor, Tensor]:
            counts = torch.arange(largest, dtype=z.dtype)
            p = 1 / (1 + torch.exp(-z[0, 0]))
            return p**counts * (1 - p), counts[:, None]

        def nll(z: Tensor, y: Tensor) -> Tensor:
            p = 1 / (1 + torch.exp(-z))
            return -(y * torch.log(p) + torch.log(1 - p)).sum()

        return Twin(nll, outcomes, torch.sigmoid)

    @pytest.fixture
    def z(self) -> Tensor:
        return torch.tensor([[-0.7], [-1.1], [-0.5]], dtype=torch.float64)

    @pytest.fixture
    def y(self) -> Tensor:
        return torch.tensor([[0.0], [3.0], [1.0]], dtype=torch.float64)

    def test_trains(self, likelihood: Geometric) -> None:
        model = torch.nn.Linear(2, 1).double()
        x = _normal(200, 2)
        y = likelihood.sample(x @ torch.tensor([[0.8], [-0.5]], dtype=x.dtype) - 0.3, torch.Generator().manual_seed(2))
        optimizer = ng.KFAC(model, likelihood, seed=0)
        losses = [float(optimizer.step(x, y)) for _ in range(15)]
        assert losses[-1] < losses[0]
        gradient = torch.autograd.grad(likelihood.nll(model(x), y), list(model.parameters()))
        assert max(float(g.abs().max()) for g in gradient) < 1e-3  # a convex problem, solved


def test_protocol_refuses_an_incomplete_class() -> None:
    class Incomplete:
        def nll(self, z: Tensor, y: Any) -> Tensor:
            return z.sum()

    assert not isinstance(Incomplete(), ng.Likelihood)
    with pytest.raises(TypeError, match="Incomplete, which lacks count, fisher_product"):
        ng.Fisher(torch.nn.Linear(2, 2), Incomplete(), torch.zeros(1, 2))
