"""A coefficient for each layer's part of K-FAC's proposal, against the dense problem that it solves."""

from typing import Any

import pytest
import torch
from optim.test_layer_kinds import small
from oracles.kfac import FIXED, WHOLE, data, dense_proposal, dense_update, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import FactoredTikhonov
from natgrad.optim.settings import Damping, Periods, Rescaling, Subsets
from natgrad.quadratic import Subspace, part_coefficients

OWN = FIXED | {"rescaling": Rescaling()}


def coefficients(F: Tensor, gradient: Tensor, parts: Tensor, damping: float, rescaling: Rescaling) -> Tensor:
    """The coefficients of the parts (columns) from their definition."""
    C = parts.T @ F @ parts + damping * parts.T @ parts
    slope = gradient @ parts
    c = torch.linalg.solve(C + rescaling.ridge * torch.diag(C.diagonal()), -slope)
    c = torch.maximum(c, -rescaling.least * slope / C.diagonal())
    return c * slope.sum() / (slope @ c)


def layer_parts(model: nn.Module, direction: Tensor) -> Tensor:
    """A column for each linear layer's part of a direction over all parameters."""
    columns, offset = [], 0
    for layer in model:
        size = sum(p.numel() for p in layer.parameters())
        if size:
            column = torch.zeros_like(direction)
            column[offset : offset + size] = direction[offset : offset + size]
            columns.append(column)
        offset += size
    return torch.stack(columns, 1)


@pytest.mark.parametrize("rescaling", [Rescaling(), Rescaling(True, 0.01, 0.0), Rescaling(ridge=2.0, least=0.9)])
@pytest.mark.parametrize(
    "likelihood", [ng.Gaussian(variance=0.7), ng.Categorical()], ids=lambda lik: type(lik).__name__
)
def test_updates_equal_the_dense_reconstruction(likelihood: Any, rescaling: Rescaling) -> None:
    """The coefficients are those of the last new inverse; α and μ are best for ``Σ c_l Δ_l`` and δ₀."""
    model, lam, l2 = mlp(4, 5, 4, 3), 0.3, 0.02
    x, y = data(likelihood, 4, 3)
    settings = FIXED | {"periods": Periods(inverses=2, early=(1,)), "rescaling": rescaling}
    opt = ng.KFAC(model, likelihood, damping=Damping(lam, FactoredTikhonov(), rule=None, ratio=1.0), l2=l2, **settings)
    previous = torch.zeros_like(vector(model))
    for k in range(1, 6):
        before, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        opt.step(x, y)
        proposal = dense_proposal(opt, model, gradient, lam + l2) if k == 1 or k % 2 == 0 else None
        if proposal is None:  # an old inverse: only that of the present factors can be rebuilt
            previous = vector(model) - before
            continue
        parts = layer_parts(model, proposal)
        c = coefficients(F, gradient, parts, lam + l2, rescaling)
        torch.testing.assert_close(opt.coefficients.values, c, rtol=1e-8, atol=1e-10)
        assert c.max() > 1.1 * c.min()  # not one scale for all
        expected = dense_update(F, lam + l2, gradient, parts @ c, previous)
        torch.testing.assert_close(vector(model) - before, expected, rtol=1e-8, atol=1e-10)
        previous = vector(model) - before


def test_coefficients_stay_as_long_as_the_inverse() -> None:
    likelihood = ng.Bernoulli()
    x, y = data(likelihood, 4, 3)
    opt = ng.KFAC(mlp(4, 3, 3), likelihood, damping=0.5, **(OWN | {"periods": Periods(inverses=3, early=(1,))}))
    found = []
    for _ in range(6):
        opt.step(x, y)
        found.append(opt.coefficients.values.clone())
    changed = [not torch.equal(a, b) for a, b in zip(found, found[1:], strict=False)]
    assert changed == [False, True, False, False, True]


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_any_model_has_them(name: str) -> None:
    """The general tangents, one part after another, solve the same problem."""
    likelihood = ng.Categorical("element")
    model, x, y = small(name)
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(likelihood.nll(model(x), y), list(model.parameters())))
    F = ng.Fisher(model, likelihood, x).to_dense()
    damping = Damping(0.3, FactoredTikhonov(), rule=None)
    twins = []
    for rescaling in (WHOLE, Rescaling()):
        model, x, y = small(name)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        opt = ng.KFAC(model, likelihood, damping=damping, **(FIXED | {"rescaling": rescaling}))
        opt.step(x, y)
        twins.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    # the update of one α tells the direction of every part; the names tell which entries are whose
    own = {key: block.members.values() for key, block in opt.coverage().blocks.items()}
    parts = []
    for members in own.values():
        flags = [torch.full_like(p, float(key in members)).flatten() for key, p in model.named_parameters()]
        parts.append(torch.cat(flags).detach() * twins[0] / opt.stats["alpha"])
    columns = torch.stack(parts, 1)
    c = coefficients(F, gradient, columns, 0.3, Rescaling())
    torch.testing.assert_close(opt.coefficients.values[: len(c)], c, rtol=1e-6, atol=1e-9)
    expected = dense_update(F, 0.3, gradient, columns @ c)
    torch.testing.assert_close(twins[1], expected, rtol=1e-6, atol=1e-9)


def test_parts_that_tell_nothing_get_the_mean_of_the_others() -> None:
    """No gradient, a slope that points up, no curvature."""
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = root @ root.T + 0.1 * torch.eye(5)
    C[4], C[:, 4] = 0.0, 0.0
    slope = torch.tensor([-1.0, 0.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    c = part_coefficients(Subspace(slope, C), 0.3, 0.05)
    known = torch.tensor([0, 2])
    alone = part_coefficients(Subspace(slope[known], C[known][:, known]), 0.3, 0.05)
    torch.testing.assert_close(c[known], alone)
    torch.testing.assert_close(c[[1, 3, 4]], alone.mean().expand(3))
    assert slope[known] @ c[known] == pytest.approx(slope[known].sum().item())


def test_one_layer_and_the_published_algorithm_have_none() -> None:
    likelihood = ng.Gaussian()
    assert not ng.KFAC(mlp(4, 3), likelihood).coefficients.active
    assert not ng.KFAC.paper(mlp(4, 3, 3), likelihood).coefficients.active
    assert not ng.KFAC(mlp(4, 3, 3), likelihood, structure="block_tridiagonal").coefficients.active
    assert ng.KFAC(mlp(4, 3, 3), likelihood, structure="ekfac").coefficients.active


def test_a_batch_that_is_not_finite_leaves_them() -> None:
    likelihood = ng.Gaussian()
    x, y = data(likelihood, 4, 3)
    opt = ng.KFAC(mlp(4, 3, 3), likelihood, damping=0.5, **OWN)
    opt.step(x, y)
    kept = opt.coefficients.values.clone()
    opt.step(torch.full_like(x, torch.nan), y)
    assert opt.stats["skipped"] == 1 and torch.equal(opt.coefficients.values, kept)


def test_resuming_keeps_them() -> None:
    likelihood = ng.Bernoulli()
    x, y = data(likelihood, 4, 3)
    settings: dict[str, Any] = {"damping": 0.5, "subsets": Subsets(0.5, 0.5), "periods": Periods(3, (1,))}
    model = mlp(4, 3, 3)
    opt = ng.KFAC(model, likelihood, **settings)
    for _ in range(2):
        opt.step(x, y)
    other = mlp(4, 3, 3, seed=5)
    other.load_state_dict(model.state_dict())
    again = ng.KFAC(other, likelihood, **settings)
    again.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(x, y)
        again.step(x, y)
    assert torch.equal(vector(model), vector(other))
    assert torch.equal(opt.coefficients.values, again.coefficients.values)


@pytest.mark.parametrize("settings", [{"ridge": 0.0}, {"ridge": float("nan")}, {"least": -0.1}, {"least": 2.0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a positive ridge and 0 <= least <= 1"):
        Rescaling(**settings)


def test_coefficients_of_layers_that_the_inverse_couples_are_refused() -> None:
    with pytest.raises(ValueError, match="structure='block_tridiagonal' couples neighbouring layers.*leave layers out"):
        ng.KFAC(mlp(4, 3, 3), ng.Gaussian(), structure="block_tridiagonal", rescaling=Rescaling(layers=True))
