"""Residuals, the regression view and the distances of Heskes, against dense matrices and autograd."""

import pytest
import torch
from curvature import oracle
from curvature.oracle import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parameters_to_vector

from natgrad.curvature import kronecker_fisher
from natgrad.diagnostics import (
    HeskesDistance,
    block_means,
    fisher_residuals,
    layerwise_kl,
    regression_view,
    residual,
)
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from natgrad.operators.autodiff import Fisher


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("damping", [None, 0.2])
def test_residuals_of_all_structures(damping) -> None:
    net, x, likelihood = Net([3, 4, 2]), draw(6, 3), Categorical()
    F = Fisher(net, likelihood, x).to_dense(order="vec")
    eye = torch.eye(len(F), dtype=F.dtype)
    exact = F if damping is None else torch.linalg.inv(F + damping * eye)
    found = fisher_residuals(net, likelihood, x, damping=damping)
    assert set(found) == {"full", "block_diagonal", "ekfac"}
    for structure, result in found.items():
        k = kronecker_fisher(net, likelihood, x, structure=structure)
        dense = k.to_dense(order="vec") if damping is None else k.inverse(damping).to_dense(order="vec")
        R = exact - dense
        assert result.layers == ("layers.0", "layers.1")
        assert result.total == pytest.approx(float(R.norm()))
        assert result.relative == pytest.approx(float(R.norm() / exact.norm()))
        assert result.total_absolute == pytest.approx(float(R.abs().sum()))
        assert float(result.absolute[0, 1]) == pytest.approx(float(R[:16, 16:].abs().sum()))
        assert result.diagonal["layers.1"] == pytest.approx(float(R[16:, 16:].norm() / exact[16:, 16:].norm()))
        assert result.captured() == pytest.approx(1 - result.relative**2)
        assert "layers.1: " in str(result)
    if damping is None:
        for name in found["full"].layers:  # the diagonal blocks of F̆ are those of F̃, and EKFAC's are nearer
            assert found["full"].diagonal[name] == pytest.approx(found["block_diagonal"].diagonal[name])
            assert found["ekfac"].diagonal[name] < 0.99 * found["block_diagonal"].diagonal[name]
    kinds = fisher_residuals(
        net, likelihood, x, structures=["block_diagonal"], damping=0.2, kinds={"block_diagonal": "exact"}
    )
    twin = kronecker_fisher(net, likelihood, x).inverse(0.2, kind="exact").to_dense(order="vec")
    R = torch.linalg.inv(F + 0.2 * eye) - twin
    assert kinds["block_diagonal"].total == pytest.approx(float(R.norm()))


def test_residual_of_matrices() -> None:
    result = residual(torch.eye(3), torch.zeros(3, 3), [1, 2])
    torch.testing.assert_close(result.frobenius, torch.tensor([[1.0, 0.0], [0.0, 2**0.5]]))
    torch.testing.assert_close(result.absolute, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert result.layers == ("0", "1") and result.relative == 1.0
    with pytest.raises(ValueError, match="add up to 4"):
        residual(torch.eye(3), torch.zeros(3, 3), [2, 2])


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(2, 7))
def test_regression_view(n) -> None:
    """B against least squares on a sample whose second moments are Σ, variable by variable."""
    sample = draw(40, n) @ draw(n, n, seed=1)
    covariance = sample.T @ sample / 40
    D, B = regression_view(covariance)
    torch.testing.assert_close(torch.diag(1 / D) @ (torch.eye(n, dtype=D.dtype) - B), torch.linalg.inv(covariance))
    for i in range(n):
        others = [j for j in range(n) if j != i]
        solved = torch.linalg.lstsq(sample[:, others], sample[:, i]).solution
        torch.testing.assert_close(B[i, others], solved)
        assert B[i, i] == 0
        left = sample[:, i] - sample[:, others] @ solved
        torch.testing.assert_close(D[i], left.square().mean())
    D_known, B_known = regression_view(covariance, inverse=torch.linalg.inv(covariance))
    torch.testing.assert_close((D_known, B_known), (D, B))


def test_a_variable_that_is_useless_beside_another() -> None:
    """[KFAC, sec. 4.1]: j = k plus independent noise predicts nothing that k does not predict better."""
    covariance = torch.tensor([[1.0, 0.6, 0.6], [0.6, 1.0, 1.0], [0.6, 1.0, 1.5]], dtype=torch.float64)
    _, B = regression_view(covariance)
    torch.testing.assert_close(B[0], torch.tensor([0.0, 0.6, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the covariance \(2, 2\) is singular.*multiple of the identity"):
        regression_view(torch.ones(2, 2))


def test_block_means() -> None:
    matrix = torch.tensor([[1.0, -2.0, 4.0], [3.0, -4.0, 0.0], [0.0, 2.0, -6.0]])
    expected = torch.tensor([[2.5, 2.0], [1.0, 6.0]])
    torch.testing.assert_close(block_means(matrix, [2, 1]), expected)
    with pytest.raises(ValueError, match="add up to 2"):
        block_means(matrix, [1, 1])


LIKELIHOODS = [Gaussian(0.3), Bernoulli(normalizer="element"), Categorical(), Poisson()]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("reverse", [False, True])
def test_hessian_of_the_layerwise_kl_is_the_exact_blocks(likelihood, reverse) -> None:
    net, x = Net([2, 3, 2]), draw(4, 2)
    theta = parameters_to_vector(net.parameters()).detach()

    def kl(parameters):
        return layerwise_kl(net, likelihood, x, parameters, reverse=reverse)

    assert abs(float(kl(theta))) < 1e-14
    gradient = torch.autograd.functional.jacobian(kl, theta)
    assert gradient.abs().max() < 1e-12
    hessian = torch.autograd.functional.hessian(kl, theta)
    blocks = kronecker_fisher(net, likelihood, x, structure="exact_block").to_dense()
    torch.testing.assert_close(hessian, blocks)
    away = theta + 0.3 * draw(len(theta), seed=2)
    assert float(kl(away)) > 0


def test_layerwise_kl_by_hand() -> None:
    """Two layers, Bernoulli outputs: the sum over both layers of Σ p log p/q + (1−p) log (1−p)/(1−q), far from θ."""
    net, x, likelihood = Net([2, 3, 2]), draw(4, 2), Bernoulli()
    other = Net([2, 3, 2], seed=1)

    def with_layer(i: int):
        mixed = Net([2, 3, 2])
        mixed.layers[i] = other.layers[i]
        return mixed(x).sigmoid()

    def total(reverse: bool) -> float:
        found, p = 0.0, net(x).sigmoid()
        for i in range(2):
            left, right = (with_layer(i), p) if reverse else (p, with_layer(i))
            term = left * (left / right).log() + (1 - left) * ((1 - left) / (1 - right)).log()
            found += term.sum().item() / 4
        return found

    parameters = parameters_to_vector(other.parameters()).detach()
    for reverse in (False, True):
        kl = layerwise_kl(net, likelihood, x, parameters, reverse=reverse)
        assert float(kl) == pytest.approx(total(reverse))


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Bernoulli(normalizer="element"), Categorical()], ids=repr)
def test_heskes_distance_is_the_quadratic_form_of_the_block_diagonal(likelihood) -> None:
    net, x = Net([2, 3, 2]), draw(4, 2)
    theta = parameters_to_vector(net.parameters()).detach()
    distance = HeskesDistance(net, likelihood, x)
    F = kronecker_fisher(net, likelihood, x, structure="block_diagonal").to_dense()
    delta = draw(len(theta), seed=2)
    assert float(distance(theta + delta)) == pytest.approx(float(0.5 * delta @ F @ delta))
    torch.testing.assert_close(torch.autograd.functional.hessian(distance, theta), F)
    # and by hand, from the definition
    total, view = 0.0, distance.view
    change = view.to_dict(delta)
    for i in range(2):
        G = oracle.factor(net, likelihood, x, i, i)[1]
        for example in oracle.examples(net, likelihood, x):
            s = change[f"layers.{i}.weight"] @ example.a[i][0][:-1] + change[f"layers.{i}.bias"]
            total += 0.5 * float(s @ G @ s) / 4
    assert float(distance(theta + delta)) == pytest.approx(total)
    with torch.no_grad():  # θ is what it was when the distance was made
        net.layers[0].weight.zero_()
    assert float(distance(theta + delta)) == pytest.approx(total)


def test_kl_refusals() -> None:
    net, x = Net([2, 3, 2]), draw(4, 2)
    theta = parameters_to_vector(net.parameters()).detach()
    with pytest.raises(ValueError, match="label smoothing or weights"):
        layerwise_kl(net, Categorical(label_smoothing=0.1), x, theta)
    with pytest.raises(TypeError, match="no to_mean"):
        layerwise_kl(net, object(), x, theta)
