"""K-FAC's update against a dense reconstruction of every step, in float64."""

import math
from typing import Any

import pytest
import torch
from oracles.kfac import EVERY_ROW, FIXED, data, dense_proposal, dense_update, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.low_rank import low_rank_pays
from natgrad.optim.settings import Damping, Periods, Subsets

LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_three_updates_equal_the_dense_reconstruction(likelihood: Any, form: Any, l2: float) -> None:
    model = mlp(4, 3, 3)
    x, y = data(likelihood, 4, 3)
    damping = Damping(0.3, form, LevenbergMarquardt(every=1, decay=0.9), ratio=1.5)
    opt = ng.KFAC(model, likelihood, damping=damping, l2=l2, **FIXED)
    previous, lam = torch.zeros_like(vector(model)), 0.3
    for _ in range(3):
        before = vector(model)
        gradient = gradient_of(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        h_before = likelihood.nll(model(x), y).item() + 0.5 * l2 * before.square().sum().item()
        loss = opt.step(x, y)
        assert loss.item() == pytest.approx(h_before - 0.5 * l2 * before.square().sum().item(), rel=1e-12)
        delta = vector(model) - before
        proposal = dense_proposal(opt, model, gradient, 2.25 * (lam + l2))
        H = F + (lam + l2) * torch.eye(len(F), dtype=torch.float64)
        D = torch.stack([proposal, previous], 1) if previous.any() else proposal[:, None]
        c = torch.linalg.solve(D.T @ H @ D, -D.T @ gradient)
        torch.testing.assert_close(delta, D @ c, rtol=1e-8, atol=1e-10)
        change = (gradient @ delta + 0.5 * delta @ H @ delta).item()
        assert change == pytest.approx(0.5 * (gradient @ delta).item(), rel=1e-9)  # M(δ) − M(0) = ½ ∇h·δ
        h_after = likelihood.nll(model(x), y).item() + 0.5 * l2 * vector(model).square().sum().item()
        rho = (h_after - h_before) / change
        assert opt.stats["rho"] == pytest.approx(rho, rel=1e-6)
        lam = lam * 0.9 if rho > 0.75 else lam / 0.9 if rho < 0.25 else lam
        assert opt.stats["lambda"] == pytest.approx(lam, rel=1e-12)
        previous = delta


@pytest.mark.parametrize("below", ["nothing", "frozen layers"])
def test_one_undamped_step_on_one_layer_is_newtons(below: str) -> None:
    model = mlp(4, 2)
    likelihood = ng.Gaussian()
    x, y = data(likelihood, 4, 2)
    if below == "frozen layers":
        model = nn.Sequential(mlp(4, 5, 4, seed=1).requires_grad_(False), nn.Tanh(), model)
    start, gradient = vector(model), gradient_of(model, likelihood, x, y, 0.0)
    H = ng.Hessian(model, likelihood, x, y).to_dense()
    opt = ng.KFAC(model, likelihood, damping=Damping(0.0, rule=None), **FIXED)
    opt.step(x, y)
    torch.testing.assert_close(vector(model), start - torch.linalg.solve(H, gradient), rtol=1e-6, atol=1e-8)
    assert opt.stats["alpha"] == pytest.approx(1.0, rel=1e-6)
    assert opt.stats["rho"] == pytest.approx(1.0, rel=1e-6)
    assert gradient_of(model, likelihood, x, y).norm() < 1e-9 * gradient.norm()  # the minimum, in one step


def test_on_a_quadratic_momentum_is_preconditioned_conjugate_gradients() -> None:
    """[KFAC, sec. 7]: λ = 0 (η in h), γ fixed, and a fixed quadratic: the squared error of one linear layer."""
    likelihood, l2, gamma2 = ng.Gaussian(), 0.1, 3.0
    model = mlp(5, 3)
    x, y = data(likelihood, 5, 3, n=20)
    H = ng.Hessian(model, likelihood, x, y).to_dense() + l2 * torch.eye(18, dtype=torch.float64)
    theta, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
    # a preconditioner that is not the inverse of H: damped with a γ² that is not η
    settings = {"subsets": EVERY_ROW, "guard": None, "periods": Periods(inverses=10**6, early=(1,))}
    damping = Damping(0.0, ExactTikhonov(), None, GreedyGamma(every=10**6))
    opt = ng.KFAC(model, likelihood, damping=damping, l2=l2, **settings)
    opt._gamma = torch.tensor(math.sqrt(gamma2), dtype=torch.float64)
    residual, direction, last = -gradient, None, None
    for _ in range(6):
        opt.step(x, y)
        preconditioned = -dense_proposal(opt, model, residual, gamma2)
        rz = residual @ preconditioned
        direction = preconditioned if direction is None else preconditioned + rz / last * direction
        alpha = rz / (direction @ H @ direction)
        theta, residual, last = theta + alpha * direction, residual - alpha * H @ direction, rz
        torch.testing.assert_close(vector(model), theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_low_rank_form_gives_the_same_update(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it pays, the gradient is preconditioned by rows and its l2 term, which has full rank, apart."""
    likelihood = ng.Bernoulli()
    x, y = data(likelihood, 9, 8, n=3)
    assert low_rank_pays(3, 7, 10) and low_rank_pays(3, 8, 8) and not low_rank_pays(12, 7, 10)
    # the inverse of a diagonal G costs nothing either way, but the product of g and a remains
    assert low_rank_pays(7, 8, 8, dense_out=False) is False and low_rank_pays(3, 8, 8, dense_out=False)
    assert not low_rank_pays(1, 8, 8, dense_out=False, dense_in=False)
    results = []
    for pays in (True, False):
        model = mlp(9, 7, 8)
        if not pays:
            monkeypatch.setattr("natgrad.optim.proposal.low_rank_pays", lambda *shape, **dense: False)
        opt = ng.KFAC(model, likelihood, damping=Damping(0.5, FactoredTikhonov(), ratio=1.0), l2=l2, **FIXED)
        assert opt.proposals.wants_rows(3) == pays
        for _ in range(2):
            opt.step(x, y)
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_low_rank_form_against_the_dense_update(l2: float) -> None:
    likelihood, model = ng.Gaussian(), mlp(9, 7, 8)
    x, y = data(likelihood, 9, 8, n=3)
    opt = ng.KFAC(model, likelihood, damping=Damping(0.5, FactoredTikhonov(), ratio=1.0), l2=l2, **FIXED)
    assert opt.proposals.wants_rows(3)
    start, g = vector(model), gradient_of(model, likelihood, x, y, l2)
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt.step(x, y)
    expected = start + dense_update(F, 0.5 + l2, g, dense_proposal(opt, model, g, 0.5 + l2))
    torch.testing.assert_close(vector(model), expected, rtol=1e-9, atol=1e-11)


def test_fast_and_general_tangents_give_the_same_update() -> None:
    likelihood = ng.Categorical()
    x, y = data(likelihood, 4, 3)
    results = []
    for forward in (None, lambda model, inputs: model(inputs)):
        model = mlp(4, 5, 3, activation=nn.Sigmoid)
        opt = ng.KFAC(model, likelihood, damping=1.0, forward=forward, subsets=Subsets(0.3, 0.5))
        assert (opt.local.chain is None) == (forward is not None)
        for _ in range(3):
            opt.step(x, y)
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalizer", ["element", "none"])
@pytest.mark.parametrize("kind", [ng.Gaussian, ng.Bernoulli, ng.Categorical])
@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
def test_the_normaliser_is_a_unit(kind: Any, normalizer: str, form: Any) -> None:
    """A loss c times as large has a Fisher matrix c times as large: with c times the λ and η the updates are the same.

    The factors and F come from some rows of the batch; the loss, the gradient and the ratio of the two are of all rows.
    """
    results = []
    x, y = data(kind(), 4, 3, n=40)
    for name in ("example", normalizer):
        model, likelihood = mlp(4, 5, 3), kind(normalizer=name)
        unit = {"example": 1.0, "none": 40.0, "element": 1.0 if kind is ng.Categorical else 1 / 3}[name]
        settings = {"damping": Damping(0.3 * unit, form), "l2": 0.01 * unit, "subsets": Subsets(0.2, 0.5)}
        opt = ng.KFAC(model, likelihood, **settings)
        for _ in range(3):
            expected = likelihood.nll(model(x), y).item()
            assert opt.step(x, y).item() == pytest.approx(expected, rel=1e-12)
        results.append(torch.cat([vector(model), torch.tensor([opt.stats["lambda"] / unit, opt.stats["rho"]])]))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-10)


class Fixed:
    """A likelihood whose draws are a function of z: a split of the batch cannot change them."""

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if isinstance(self, ng.Categorical):
            return (37 * z).sum(-1).long() % z.shape[-1]
        return (37 * z).sin() if isinstance(self, ng.Gaussian) else ((37 * z).sin() > 0).to(z.dtype)


FIXED_DRAWS = [
    type(f"Fixed{kind.__name__}", (Fixed, kind), {})(**settings)
    for kind, settings in (
        (ng.Gaussian, {"variance": 0.7}),
        (ng.Bernoulli, {"normalizer": "element"}),
        (ng.Categorical, {"normalizer": "none"}),
    )
]


@pytest.mark.parametrize("likelihood", FIXED_DRAWS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("split", [1, 5, 12, "iterable"])
def test_micro_batches_give_the_same_updates(likelihood: Any, split: int | str) -> None:
    x, y = data(likelihood, 4, 3)
    whole, parts = mlp(4, 5, 6, 3), mlp(4, 5, 6, 3)
    settings = {"subsets": EVERY_ROW, "l2": 0.01, "static_inputs": x}
    one, other = (ng.KFAC(model, likelihood, **settings) for model in (whole, parts))
    pairs = [(x[:2], y[:2]), (x[2:9], y[2:9]), (x[9:], y[9:])]
    for _ in range(3):
        expected = one.step(x, y)
        found = other.step(pairs) if split == "iterable" else other.step(x, y, micro_batch_size=split)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(vector(parts), vector(whole), rtol=1e-9, atol=1e-12)
    for name in ("lambda", "gamma", "alpha", "mu", "rho", "step_norm"):
        assert other.stats[name] == pytest.approx(one.stats[name], rel=1e-6)
    for name, block in one._running.factors.items():
        torch.testing.assert_close(other._running.factors[name].to_dense(), block.to_dense(), rtol=1e-8, atol=1e-12)


def test_micro_batches_with_the_diagonal_of_what_no_factor_covers() -> None:
    likelihood = FIXED_DRAWS[1]
    x, y = data(likelihood, 4, 3)
    results = []
    for size in (None, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt = ng.KFAC(model, likelihood, damping=0.3, subsets=EVERY_ROW, uncovered="diagonal")
        opt.step(x, y, micro_batch_size=size)
        results.append(vector(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_learning_rate_multiplies_the_step() -> None:
    likelihood = ng.Gaussian()
    x, y = data(likelihood, 4, 2)
    deltas = []
    for lr in (1.0, 0.25):
        model = mlp(4, 3, 2)
        start = vector(model)
        opt = ng.KFAC(model, likelihood, damping=1.0)
        opt.param_groups[0]["lr"] = lr
        opt.step(x, y)
        deltas.append(vector(model) - start)
    torch.testing.assert_close(deltas[1], 0.25 * deltas[0], rtol=1e-10, atol=1e-14)
