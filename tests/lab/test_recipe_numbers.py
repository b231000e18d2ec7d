"""What the recipes compute, against equations written out: figures 5 and 6 of [KFAC], figure 1 of [NATGRAD]."""

from pathlib import Path

import pytest
import torch

from natgrad_lab.recipes.base import find
from natgrad_lab.recipes.natgrad import divergence, proposal
from natgrad_lab.recipes.run import Run


def test_approximations_have_the_blocks_that_they_must_have(tmp_path: Path) -> None:
    """F̆ has the diagonal blocks of the damped F̃, F̂ the tridiagonal ones, and F̂ is nearer in the inverse."""
    (tmp_path / "5").mkdir()
    (tmp_path / "6").mkdir()
    result = Run(find("kfac-fig5"), tmp_path / "5", quick=True).execute().results["matrices"]
    size = torch.tensor(result["means"]).diagonal().mean()
    diagonal, tridiagonal = (torch.tensor(result["errors"][name]["means"]) / size for name in ("F̆", "F̂"))
    assert diagonal.diagonal().max() < 1e-12 and diagonal.diagonal(1).min() > 0.1
    assert max(tridiagonal.diagonal(k).max() for k in (-1, 0, 1)) < 1e-12 and tridiagonal.diagonal(2).min() > 1e-3
    errors = Run(find("kfac-fig6"), tmp_path / "6", quick=True).execute().results["matrices"]["errors"]
    assert errors["F̂"]["Frobenius error"] < 0.6 * errors["F̆"]["Frobenius error"]


def test_proposals_are_those_of_the_equations() -> None:
    x = torch.randn(30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.tensor([0.7, -0.4], dtype=torch.float64)

    def errors(t: torch.Tensor) -> torch.Tensor:
        return (x[:, 0] - t[0] * torch.sigmoid(t[0] * x[:, 0] + t[1]) + t[1]).square()

    def outputs(t: torch.Tensor) -> torch.Tensor:
        return t[0] * torch.sigmoid(t[0] * x[:, 0] + t[1]) - t[1]

    eye = torch.eye(2, dtype=torch.float64)
    each = torch.func.jacrev(errors)(theta)
    gradient, J = each.mean(0), torch.func.jacrev(outputs)(theta)
    centred = each - gradient
    matrices = {
        "natural gradient": (0.5, 0.01, 2 * J.T @ J / 30),
        "covariance": (1.0, 1.0, centred.T @ centred / 30),
        "Newton": (1.0, 1.0, torch.func.hessian(lambda t: errors(t).mean())(theta)),
    }
    assert torch.allclose(proposal(x, theta, "gradient descent", 0.1, None), -0.1 * gradient)
    for method, (rate, damping, matrix) in matrices.items():
        expected = -rate * torch.linalg.inv(matrix + damping * eye) @ gradient
        assert torch.allclose(proposal(x, theta, method, rate, damping), expected), method
    step = 1e-4 * torch.tensor([1.0, 2.0], dtype=torch.float64)
    metric = matrices["natural gradient"][2]
    assert divergence(x, theta, theta + step).item() == pytest.approx((0.5 * step @ metric @ step).item(), rel=1e-3)
