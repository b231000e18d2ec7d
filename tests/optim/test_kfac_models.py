"""K-FAC with models and likelihoods of many kinds, and with calls that do not fit."""

from typing import Any

import pytest
import torch
from oracles.kfac import data, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping_rules import GreedyGamma
from natgrad.optim.settings import Damping


def test_batch_statistics_and_dropout_are_those_of_one_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)
    ).double()
    likelihood = ng.Gaussian()
    x, y = data(likelihood, 5, 2, n=16)
    opt = ng.KFAC(model, likelihood, damping=1e6, guard=None)
    opt.step(x, y)
    assert model[1].num_batches_tracked.item() == 1  # the gradient pass alone moves the running statistics
    # a tiny step under a huge λ: the loss falls by ∇h·δ and M by half of it, if and only if the loss, the model and the
    # trial saw the same masks and the same normalisation
    assert opt.stats["rho"] == pytest.approx(2.0, abs=1e-4)


class _Poisson:
    """A likelihood of a user's own: counts with log-rate z."""

    def nll(self, z: Tensor, y: Tensor, *, weight: Tensor | None = None, count: Any = None) -> Tensor:
        value = z.exp() - y * z
        value = value if weight is None else value * weight
        return value.sum() / (self.count(z, y, weight) if count is None else count)

    def count(self, z: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return torch.tensor(float(z.shape[0]), dtype=z.dtype)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(z.exp(), generator=generator)

    def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
        return z.exp() * v

    def fisher_factor(self, z: Tensor) -> Tensor:
        return torch.diag_embed(z.exp().sqrt())


def test_a_likelihood_of_the_users_own_trains() -> None:
    likelihood = _Poisson()
    assert isinstance(likelihood, ng.Likelihood)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    truth = torch.randn(4, 2, generator=generator, dtype=torch.float64) * 0.5
    y = torch.poisson((x @ truth).exp(), generator=generator)
    model = mlp(4, 2)
    opt = ng.KFAC(model, likelihood, damping=0.1)
    for _ in range(30):
        opt.step(x, y)
    gradient = gradient_of(model, likelihood, x, y, 0.0)
    assert gradient.norm() < 1e-4  # at the maximum of the likelihood


def test_one_example_and_single_precision() -> None:
    model = mlp(4, 3, 2).float()
    x, y = torch.randn(1, 4), torch.rand(1, 2)
    opt = ng.KFAC(model, ng.Bernoulli())
    for _ in range(5):
        loss = opt.step(x, y)
    assert loss.dtype == torch.float32 and torch.isfinite(vector(model)).all()


def test_bad_calls_are_explained() -> None:
    model = mlp(4, 3)
    x, y = data(ng.Gaussian(), 4, 3)
    opt = ng.KFAC(model, ng.Gaussian())
    before = vector(model)
    with pytest.raises(TypeError, match="Preconditioner"):
        opt.step(lambda: 0.0)
    with pytest.raises(TypeError, match="Preconditioner"):
        opt.step(x, y, closure=lambda: 0.0)
    with pytest.raises(TypeError, match="targets is missing"):
        opt.step(x)
    with pytest.raises(ValueError, match="targets: 3 examples for 12"):
        opt.step(x, y[:3])
    with pytest.raises(ValueError, match="empty"):
        opt.step(x[:0], y[:0])
    with pytest.raises(ValueError, match="micro_batch_size"):
        opt.step(x, y, micro_batch_size=0)
    with pytest.raises(ValueError, match="float32"):
        opt.step(x.float(), y)
    for wrong in ({"structure": "diagonal"}, {"l2": -1.0}, {"decay": 1.0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ng.KFAC(model, ng.Gaussian(), **wrong)
    with pytest.raises(ValueError, match="multiple of T₃"):
        ng.KFAC(model, ng.Gaussian(), damping=Damping(gamma=GreedyGamma(every=7)))
    assert torch.equal(before, vector(model))
