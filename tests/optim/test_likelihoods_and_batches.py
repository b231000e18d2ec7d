"""Losses with weights, masks and ignored targets: one direction for any split into micro-batches, for mean and sum."""

from typing import Any

import pytest
import torch
from optim.test_layer_kinds import Transformer
from oracles.layers import draw
from oracles.preconditioning import exact, gradient
from torch import Tensor, nn

import natgrad as ng
from natgrad.operators.kronecker import layer_index

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.3, 0.7, 1.0], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1.0, 0.0], [0.3, 0.0, 0.0], [1.0, 0.5, 2.0], [0.0, 1.0, 0.0]], dtype=torch.float64)


def classes() -> Tensor:
    """Four sequences of three tokens, of which 2, 1, 3 and 1 count."""
    return torch.tensor([[0, 4, -100], [-100, 2, -100], [1, 1, 3], [2, -100, -100]])


def counts() -> Tensor:
    return torch.randint(0, 4, (4, 3, 5), generator=torch.Generator().manual_seed(3)).double()


def labels() -> Tensor:
    return (counts() > 1).double()


# A likelihood for every normaliser, targets, and the weights of a loss.
CASES: dict[str, tuple[Any, Any, Tensor | None]] = {
    "tokens": (lambda n: ng.Categorical(n), classes, None),
    "tokens, weights": (lambda n: ng.Categorical(n), lambda: classes().clamp(min=0), MASK),
    "tokens, smoothed": (lambda n: ng.Categorical(n, label_smoothing=0.2), classes, None),
    "tokens, class weights": (lambda n: ng.Categorical(n, class_weight=CLASS_WEIGHT), classes, None),
    "multi-label": (lambda n: ng.Bernoulli(n), labels, None),
    "multi-label, pos_weight and mask": (lambda n: ng.Bernoulli(n, pos_weight=CLASS_WEIGHT), labels, MASK),
    "counts, mask": (lambda n: ng.Poisson(n), counts, MASK),
    "regression, mask": (lambda n: ng.Gaussian(0.5, n), counts, MASK),
}


def model_and_ids() -> tuple[nn.Module, Tensor]:
    return Transformer(5, 4, 3, 1).double(), torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(0))


def direction(likelihood: Any, y: Tensor, weight: Tensor | None, sizes: list[int], damping: float = 0.1) -> Tensor:
    """The preconditioned gradient of the whole batch's loss, made in micro-batches of so many sequences."""
    model, ids = model_and_ids()
    pre = exact(model, likelihood, damping=damping)
    with torch.no_grad():
        count = likelihood.count(model(ids), y, weight)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        z, w = model(ids[part]), None if weight is None else weight[part]
        pre.observe(z, y[part], weight=w)
        likelihood.nll(z, y[part], weight=w, count=count).backward()
        start += size
    pre.step()
    return gradient(model)


@pytest.mark.parametrize("normalizer", ["example", "element"])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_of_unequal_counts(name: str, normalizer: str) -> None:
    make, targets, weight = CASES[name]
    expected = direction(make(normalizer), targets(), weight, [4])
    for sizes in ([1, 3], [2, 1, 1]):
        found = direction(make(normalizer), targets(), weight, sizes)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_mean_and_sum(name: str) -> None:
    """The gradient, the curvature and the damping of a sum are all so many times those of the mean."""
    make, targets, weight = CASES[name]
    model, ids = model_and_ids()
    y, mean = targets(), make("element")
    count = float(mean.count(model(ids), y, weight))
    assert count not in (1.0, 4.0)
    expected = direction(mean, y, weight, [4])
    found = direction(make("none"), y, weight, [4], damping=0.1 * count)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("normalizer", ["example", "element", "none"])
@pytest.mark.parametrize("name", CASES)
def test_one_example_at_one_position_is_the_fisher_matrix(name: str, normalizer: str) -> None:
    """K-FAC is exact there, so that scale and weights are those of the loss: against differentiating it twice."""
    make, targets, weight = CASES[name]
    likelihood, y = make(normalizer), targets()[2:3, :1]
    w = None if weight is None else weight[2:3, :1]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double(), draw(1, 1, 3)
    k = ng.kronecker_fisher(model, likelihood, x, y=y, weight=w)
    z = model(x).detach()
    # The Hessian of these losses in z does not depend on a hard y, but for weights that y selects; it is F_R then.
    H = torch.autograd.functional.hessian(lambda z: likelihood.nll(z, y, weight=w), z).reshape(5, 5)
    parameters = list(model.parameters())
    J = torch.stack(
        [
            torch.cat([d.flatten() for d in torch.autograd.grad(s, parameters, retain_graph=True)])
            for s in model(x).flatten()
        ]
    )
    F = J.T @ H @ J
    for block, (index, found) in zip(k.coverage().blocks.values(), k.blocks, strict=True):
        assert torch.equal(index, layer_index(k.domain, block))
        torch.testing.assert_close(found.to_dense(), F[index[:, None], index], rtol=1e-9, atol=1e-12)
