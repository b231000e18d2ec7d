"""[NATGRAD, sec. 4.1] in numbers: ranks, spectra and the distance of the gradient covariance from the metric."""

import pytest
import torch
from oracles import networks
from oracles.preconditioning import mlp
from torch import Tensor, nn

import natgrad as ng
from natgrad_lab.covariance_and_metric import approach, compare, deterministic_ratio

LIKELIHOODS = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "categorical": ng.Categorical()}


@pytest.mark.parametrize("family", LIKELIHOODS)
@pytest.mark.parametrize("name", ["mlp", "conv", "layer_norm"])
def test_spectra_and_distance_are_those_of_the_dense_matrices(name: str, family: str) -> None:
    case, likelihood = networks.case(name), LIKELIHOODS[family]
    y = networks.targets(family, case.z)
    U = ng.EmpiricalFisher(case.model, likelihood, case.x, y).to_dense()
    G = ng.Fisher(case.model, likelihood, case.x).to_dense()
    found = compare(case.model, likelihood, case.x, y)
    for eigenvalues, matrix in ((found.of_u, U), (found.of_g, G)):
        expected = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)
        shared = min(len(eigenvalues), len(expected))
        torch.testing.assert_close(eigenvalues[:shared], expected[:shared], atol=1e-9, rtol=1e-6)
    assert found.distance == pytest.approx(float((U - G).norm() / G.norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "per_example"), [("gaussian", 3), ("bernoulli", 3), ("categorical", 2)])
def test_u_has_one_direction_for_every_example_and_g_one_for_every_output(
    family: str, per_example: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, n = mlp(6, 10, 3).to(dtype), 7
    x = torch.randn(n, 6, dtype=dtype)
    y = networks.targets(family, model(x).detach())
    found = compare(model, LIKELIHOODS[family], x, y)
    assert (found.rank_u, found.rank_g) == (n, n * per_example)
    assert len(found.of_u) == n and len(found.of_g) == 3 * n


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mlp(4, 3, 3, seed=1), mlp(4, 3, 3, seed=2), x


@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
def test_u_approaches_g_where_p_approaches_q_and_n_grows(family: str) -> None:
    model, teacher, x = pair()
    for p in teacher.parameters():
        p.data.mul_(3)  # far from the start
    before = [p.clone() for p in model.parameters()]
    found = {
        (point.share, point.examples): point.distance
        for point in approach(model, teacher, LIKELIHOODS[family], x, shares=(0.0, 0.5, 1.0), sizes=(50, 200, 800))
    }
    # at p = q the distance falls as 1/√n
    assert found[1.0, 800] < 0.2 and 2 < found[1.0, 50] / found[1.0, 800] < 8
    # away from it, it stops falling
    assert found[0.0, 800] > 2 * found[1.0, 800] and found[0.0, 800] > 0.5 * found[0.0, 200]
    assert found[0.0, 800] > found[0.5, 800] > found[1.0, 800]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_deterministic_labels_make_u_vanish_before_g(p: float) -> None:
    assert deterministic_ratio(p) == pytest.approx((1 - p) / p, rel=1e-9)


def test_bad_arguments_are_named() -> None:
    model, teacher, x = pair()
    with pytest.raises(ValueError, match="x: 2000 inputs for sizes up to 3000"):
        approach(model, teacher, ng.Bernoulli(), x, sizes=(3000,))
    with pytest.raises(ValueError, match="p=1.0: expected a probability"):
        deterministic_ratio(1.0)
    with pytest.raises(TypeError, match="likelihood: expected an object like"):
        compare(model, nn.MSELoss(), x, x)  # type: ignore
    with pytest.raises(ValueError, match="BatchNorm1d"):
        compare(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), ng.Bernoulli(), x, x[:, :3])
