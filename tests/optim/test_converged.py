"""Where h has converged, its changes are rounding: no damping rule may take them for news."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng

OPTIMISERS: dict[str, Any] = {
    "HessianFree": ng.HessianFree,
    "KFAC": ng.KFAC,
    "NaturalGradient": ng.NaturalGradient,
}


def _task(seed: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((60, 4), (4, 3)))
    return x, x @ w + noise * torch.randn(60, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_lambda_rests_at_the_minimum_and_other_data_are_learnt(make: Any, dtype: torch.dtype) -> None:
    """λ grew by half at every update, to 10³⁰ and more, and nothing was learnt any more."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=dtype)
    opt = make(model, ng.Gaussian())
    x, y = (t.to(dtype) for t in _task(0, 0.1))
    for _ in range(40):
        opt.step(x, y)
    assert opt.stats["rho"] == 0.5 and opt.stats["lambda"] < 1
    rest = opt.stats["lambda"]
    opt.step(x, y)
    assert opt.stats["lambda"] == rest
    x, y = (t.to(dtype) for t in _task(1, 0.0))
    for _ in range(12):
        loss = opt.step(x, y)
    assert loss < 1e-8


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_loss_of_zero_leaves_a_lambda_from_which_it_recovers(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = make(model, ng.Gaussian())
    x, y = (t.float() for t in _task(1, 0.0))
    for _ in range(50):
        opt.step(x, y)
    x, y = (t.float() for t in _task(2, 0.0))
    for _ in range(60):
        loss = opt.step(x, y)
    assert loss < 1e-6
