"""What every likelihood must do. Subclass `LikelihoodContract` and supply `likelihood`, `twin`, `z` and `y`.

The methods of the protocol are tested for every likelihood, the optional ones where it has them.
"""

from typing import Any

import pytest
import torch
from oracles.distributions import Twin, expected_hessian, fisher
from torch import Tensor, nn

import natgrad as ng
from natgrad.likelihoods import score

SAMPLES = 20_000


class LikelihoodContract:
    """Inherit, override the four fixtures, and every test below runs on your likelihood."""

    @pytest.fixture
    def likelihood(self) -> ng.Likelihood:
        raise NotImplementedError("override the fixture `likelihood`")

    @pytest.fixture
    def twin(self) -> Twin:
        raise NotImplementedError("override the fixture `twin`")

    @pytest.fixture
    def z(self) -> Tensor:
        """A batch of a few examples with at most four outputs each, float64."""
        raise NotImplementedError("override the fixture `z`")

    @pytest.fixture
    def y(self) -> Tensor:
        raise NotImplementedError("override the fixture `y`")

    def test_protocol(self, likelihood: ng.Likelihood) -> None:
        assert isinstance(likelihood, ng.Likelihood)

    def test_nll(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor, y: Tensor) -> None:
        summed = twin.nll(z, y)
        torch.testing.assert_close(likelihood.nll(z, y, count=1), summed)
        torch.testing.assert_close(likelihood.nll(z, y, count=3.5), summed / 3.5)
        torch.testing.assert_close(likelihood.nll(z, y), summed / likelihood.count(z, y))
        assert likelihood.nll(z, y).shape == ()

    def test_count(self, likelihood: ng.Likelihood, z: Tensor, y: Tensor) -> None:
        count = likelihood.count(z, y)
        assert count.shape == () and count.device == z.device and float(count) > 0
        torch.testing.assert_close(likelihood.count(z, y, None), likelihood.count(z, y, weight=None))

    def test_gradient_of_the_nll(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(
            _gradient(lambda e: likelihood.nll(e, y), z),
            _gradient(lambda e: twin.nll(e, y), z) / likelihood.count(z, y),
        )

    def test_score_is_the_gradient_of_the_sum(
        self, likelihood: ng.Likelihood, twin: Twin, z: Tensor, y: Tensor
    ) -> None:
        expected = _gradient(lambda e: twin.nll(e, y), z)
        torch.testing.assert_close(score(likelihood, z, y), expected)
        with torch.no_grad():
            torch.testing.assert_close(score(likelihood, z, y), expected)

    def test_expected_score_is_zero(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor) -> None:
        p, y = twin.outcomes(z[:1])
        torch.testing.assert_close(p.sum(), torch.ones_like(p.sum()))
        s = score(likelihood, z[:1].expand(len(p), *z.shape[1:]), y).reshape(len(p), -1)
        torch.testing.assert_close(p @ s, torch.zeros_like(s[0]), atol=1e-10, rtol=0)

    def test_fisher_product_is_the_expected_outer_product(
        self, likelihood: ng.Likelihood, twin: Twin, z: Tensor
    ) -> None:
        torch.testing.assert_close(_dense_fisher(likelihood, z), fisher(twin, z))

    def test_fisher_product_is_the_expected_hessian(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor) -> None:
        torch.testing.assert_close(_dense_fisher(likelihood, z), expected_hessian(twin, z))

    def test_fisher_product_of_one_vector(self, likelihood: ng.Likelihood, z: Tensor) -> None:
        v = torch.stack([torch.sin(z + k) for k in range(3)])
        columns = likelihood.fisher_product(z, v)
        assert columns.shape == v.shape
        for k in range(3):
            torch.testing.assert_close(columns[k], likelihood.fisher_product(z, v[k]))

    def test_fisher_factor(self, likelihood: ng.Likelihood, z: Tensor) -> None:
        factor = likelihood.fisher_factor(z)
        assert factor.shape[:-1] == z.shape
        s = factor.reshape(len(z), -1, factor.shape[-1])
        torch.testing.assert_close(s @ s.mT, _dense_fisher(likelihood, z))

    def test_fisher_diagonal(self, likelihood: ng.Likelihood, z: Tensor) -> None:
        diagonal = _optional(likelihood, "fisher_diagonal")(z)
        if diagonal is not None:
            assert diagonal.shape == z.shape
            torch.testing.assert_close(torch.diag_embed(diagonal.reshape(len(z), -1)), _dense_fisher(likelihood, z))

    def test_fisher_in_the_mean_parametrisation(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor) -> None:
        to_mean, product = _optional(likelihood, "to_mean"), _optional(likelihood, "mean_fisher_product")
        torch.testing.assert_close(to_mean(z), twin.mean(z))
        exact = fisher(twin, z)
        for row, expected in zip(z.split(1), exact, strict=True):
            shape = row.shape
            j = torch.func.jacrev(lambda e, shape=shape: twin.mean(e.reshape(shape)).flatten())(row.flatten())
            columns = j.T.reshape(-1, *shape)  # the tangent of p along every output
            d_j = product(to_mean(row), columns).reshape(len(columns), -1).T
            torch.testing.assert_close(j.T @ d_j, expected)

    def test_samples_have_the_moments_of_the_scores(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor) -> None:
        """Mean and second moment of the samples' scores are within five standard errors of 0 and F_R."""
        repeated = z[:1].expand(SAMPLES, *z.shape[1:]).contiguous()
        s = score(likelihood, repeated, likelihood.sample(repeated, torch.Generator().manual_seed(0))).reshape(
            SAMPLES, -1
        )
        products = torch.einsum("ni,nj->nij", s, s).flatten(1)
        _within_standard_errors(s, torch.zeros_like(s[0]))
        _within_standard_errors(products, fisher(twin, z[:1]).flatten())

    def test_samples_are_joint_over_the_outputs(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor) -> None:
        """A random projection of the score has a fourth moment too: draws shared by outputs would show."""
        repeated = z[:1].expand(SAMPLES, *z.shape[1:]).contiguous()
        s = score(likelihood, repeated, likelihood.sample(repeated, torch.Generator().manual_seed(1))).reshape(
            SAMPLES, -1
        )
        direction = torch.linspace(-1, 1.7, s.shape[1], dtype=s.dtype)
        variance = direction @ fisher(twin, z[:1])[0] @ direction
        _within_standard_errors((s @ direction)[:, None].square(), variance[None])

    def test_sampling_uses_the_generator_alone(self, likelihood: ng.Likelihood, z: Tensor) -> None:
        before = torch.random.get_rng_state()
        leaf = z.clone().requires_grad_()
        first = likelihood.sample(leaf, torch.Generator().manual_seed(3))
        second = likelihood.sample(z, torch.Generator().manual_seed(3))
        assert torch.equal(first, second)
        assert not first.requires_grad
        assert torch.equal(torch.random.get_rng_state(), before)
        many = z[:1].expand(200, *z.shape[1:])
        draws = likelihood.sample(many, torch.Generator().manual_seed(3))
        assert not torch.equal(draws, likelihood.sample(many, torch.Generator().manual_seed(4)))

    def test_samples_are_possible_targets(self, likelihood: ng.Likelihood, z: Tensor, y: Tensor) -> None:
        sample = likelihood.sample(z, torch.Generator().manual_seed(5))
        assert sample.shape == y.shape and sample.dtype == y.dtype
        _optional(likelihood, "validate")(z, sample)
        assert torch.isfinite(likelihood.nll(z, sample))

    def test_float32(self, likelihood: ng.Likelihood, z: Tensor, y: Tensor) -> None:
        z32, y32 = z.float(), y.float() if y.is_floating_point() else y
        outputs = [
            likelihood.nll(z32, y32),
            likelihood.fisher_product(z32, z32),
            likelihood.fisher_factor(z32),
            score(likelihood, z32, likelihood.sample(z32, torch.Generator().manual_seed(0))),
        ]
        assert {out.dtype for out in outputs} == {torch.float32}
        torch.testing.assert_close(outputs[0].double(), likelihood.nll(z, y), rtol=1e-4, atol=1e-5)

    def test_a_batch_of_one(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(likelihood.nll(z[:1], y[:1], count=1), twin.nll(z[:1], y[:1]))
        v = torch.cos(z)
        torch.testing.assert_close(likelihood.fisher_product(z[:1], v[:1]), likelihood.fisher_product(z, v)[:1])

    def test_in_the_exact_fisher(self, likelihood: ng.Likelihood, twin: Twin, z: Tensor, y: Tensor) -> None:
        """``natgrad.Fisher`` of a model whose output is its parameter: F_R / count, block by block."""
        model = Constant(z)
        dense = ng.Fisher(model, likelihood, torch.arange(len(z)), y=y).to_dense()
        torch.testing.assert_close(dense, torch.block_diag(*fisher(twin, z)) / likelihood.count(z, y))

    def test_inputs_are_left_alone(self, likelihood: ng.Likelihood, z: Tensor, y: Tensor) -> None:
        z0, y0 = z.clone(), y.clone()
        likelihood.nll(z, y)
        likelihood.fisher_product(z, z).add_(1)
        likelihood.fisher_factor(z).add_(1)
        likelihood.sample(z, torch.Generator().manual_seed(0)).add_(1)
        score(likelihood, z, y)
        assert torch.equal(z, z0) and torch.equal(y, y0)


class Constant(nn.Module):
    """Its output for the examples with these indices is a parameter."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(z.clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.z[index]


def _optional(likelihood: ng.Likelihood, method: str) -> Any:
    if not hasattr(likelihood, method):
        pytest.skip(f"{type(likelihood).__name__} has no {method}, which is optional")
    return getattr(likelihood, method)


def _gradient(f: Any, z: Tensor) -> Tensor:
    leaf = z.detach().clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


def _dense_fisher(likelihood: ng.Likelihood, z: Tensor) -> Tensor:
    """``[batch, D, D]`` from products with every unit vector."""
    size = z[0].numel()
    units = torch.eye(size, dtype=z.dtype).reshape(size, 1, *z.shape[1:]).expand(size, *z.shape)
    return likelihood.fisher_product(z, units).reshape(size, len(z), size).permute(1, 2, 0)


def _within_standard_errors(samples: Tensor, expected: Tensor) -> None:
    error = (samples.mean(0) - expected).abs()
    allowed = 5 * samples.std(0) / len(samples) ** 0.5 + 1e-12
    assert bool((error <= allowed).all()), f"off by {(error / allowed * 5).max():.1f} standard errors"
