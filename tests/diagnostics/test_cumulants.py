"""The error of F̃ as higher cumulants: against cumulants of an enumerated distribution, and against dense matrices."""

import itertools

import pytest
import torch
from curvature import oracle
from curvature.oracle import Net
from torch import Tensor, nn

from natgrad.curvature import kronecker_fisher
from natgrad.diagnostics import (
    HeskesDistance,
    cumulant_report,
    exact_pass,
    fisher_residuals,
    layerwise_kl,
    pair_cumulants,
)
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian
from natgrad.operators.autodiff import Fisher

LIKELIHOODS = [Gaussian(0.3), Bernoulli(), Categorical(), Bernoulli(normalizer="element")]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(probabilities: Tensor, *columns: Tensor) -> Tensor:
    """E of the product of all non-empty subsets is what a cumulant needs: this is one of them."""
    product = probabilities.clone()
    for column in columns:
        product = product * column
    return product.sum()


def partitions(items: list[int]):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in partitions(rest):
        for index, block in enumerate(partition):
            yield [*partition[:index], [first, *block], *partition[index + 1 :]]
        yield [[first], *partition]


def cumulant(probabilities: Tensor, *columns: Tensor) -> Tensor:
    """κ by the general formula: Σ over partitions of (−1)^(b−1) (b−1)! Π E[block]."""
    total = torch.zeros((), dtype=torch.float64)
    for partition in partitions(list(range(len(columns)))):
        term = torch.tensor(1.0, dtype=torch.float64)
        for block in partition:
            term = term * moments(probabilities, *(columns[i] for i in block))
        b = len(partition)
        total = total + (-1) ** (b - 1) * torch.lgamma(torch.tensor(float(b))).exp() * term
    return total


def test_terms_are_cumulants_of_the_enumerated_distribution() -> None:
    """Every (x, y) with its probability; all 15 partitions, none assumed to vanish."""
    net, x, likelihood = Net([2, 3, 2]), draw(5, 2), Categorical()
    inputs: list[list[Tensor]] = [[], []]
    derivatives: list[list[Tensor]] = [[], []]
    probabilities = []
    for n, c in itertools.product(range(5), range(2)):
        example = oracle.examples(net, likelihood, x[n : n + 1])[0]
        p = net(x[n : n + 1]).softmax(-1)[0].detach()
        score = p - torch.eye(2, dtype=p.dtype)[c]
        probabilities.append(p[c] / 5)
        for i in range(2):
            inputs[i].append(example.a[i][0])
            derivatives[i].append(example.J[i][:, 0].T @ score)
    P = torch.stack(probabilities)
    found = exact_pass(net, likelihood, x)
    names = list(found.inputs)
    for i, j in itertools.product(range(2), range(2)):
        pair = pair_cumulants(found, names[i], names[j])
        a, b = torch.stack(inputs[i]), torch.stack(inputs[j])
        g, h = torch.stack(derivatives[i]), torch.stack(derivatives[j])
        for k1, k2, k3, k4 in [(0, 0, 0, 0), (1, 1, 0, 1), (-1, 0, 1, 1), (0, 1, -1, 0), (-1, 0, -1, 1)]:
            a1, g1, a2, g2 = a[:, k1], g[:, k2], b[:, k3], h[:, k4]
            where = (k1, k2, k3, k4)
            torch.testing.assert_close(pair.fourth[where], cumulant(P, a1, a2, g1, g2))
            torch.testing.assert_close(pair.first_mean[where], moments(P, a1) * cumulant(P, a2, g1, g2))
            torch.testing.assert_close(pair.second_mean[where], moments(P, a2) * cumulant(P, a1, g1, g2))
            error = moments(P, a1, a2, g1, g2) - moments(P, a1, a2) * moments(P, g1, g2)
            torch.testing.assert_close(pair.error[where], error)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_expression_is_the_error_of_the_approximation(likelihood) -> None:
    net, x = Net([3, 4, 3, 2]), draw(7, 3)
    F = Fisher(net, likelihood, x).to_dense(order="vec")
    approximation = kronecker_fisher(net, likelihood, x, structure="full").to_dense(order="vec")
    found = exact_pass(net, likelihood, x)
    sizes = [16, 15, 8]
    blocks = [row.split(sizes, dim=1) for row in (F - approximation).split(sizes)]
    report = cumulant_report(net, likelihood, x)
    for i, j in itertools.product(range(3), range(3)):
        pair = pair_cumulants(found, f"layers.{i}", f"layers.{j}")
        torch.testing.assert_close(pair.expression, pair.error)
        dense = pair.error.reshape(sizes[i], sizes[j])  # columns of [W b] stacked: the input counts slowly
        torch.testing.assert_close(dense, blocks[i][j])
        assert (pair.bound >= pair.error.abs() - 1e-12).all()
        torch.testing.assert_close(report.error[i, j], blocks[i][j].abs().sum())
        torch.testing.assert_close(report.bound[i, j], pair.bound.sum())
    assert report.total_error == pytest.approx(float((F - approximation).abs().sum()))
    assert report.total_bound > 1.05 * report.total_error
    middle = cumulant_report(net, likelihood, x, layers=("layers.1",))
    assert middle.error.shape == (1, 1) and middle.total_error == pytest.approx(float(report.error[1, 1]))


def test_gaussian_inputs_of_a_linear_layer_have_no_higher_cumulants() -> None:
    """One linear layer with Gaussian noise: g is independent of a, and the approximation is exact."""
    report = cumulant_report(Net([3, 2]), Gaussian(), draw(9, 3))
    assert report.total_error < 1e-12 and report.total_bound < 1e-12


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="layers: \\['fc'\\] are none of this model's layers \\['layers.0'\\]"):
        cumulant_report(Net([3, 2]), Gaussian(), draw(4, 3), layers=("fc",))
    with pytest.raises(ValueError, match="layer 'layers.0' .*one row for each of the 4 examples"):
        cumulant_report(Net([3, 2]), Gaussian(), draw(4, 2, 3))
    images = draw(3, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).double()
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    for refused in (
        lambda: cumulant_report(net, Gaussian(), images),
        lambda: fisher_residuals(net, Gaussian(), images),
        lambda: HeskesDistance(net, Gaussian(), images),
        lambda: layerwise_kl(net, Gaussian(), images, theta),
    ):
        with pytest.raises(ValueError, match=r"nn\.Linear layers alone, got 0\.weight \(Conv2d\), .*; freeze those"):
            refused()
    net[0].requires_grad_(False)
    assert fisher_residuals(net, Gaussian(), images)["full"].layers == ("2",)
