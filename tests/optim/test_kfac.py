"""K-FAC's update against a dense reconstruction of every step, in float64, and what must not change."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.settings import Damping, Periods, StepGuard, Subsets

EVERY_ROW = Subsets(1.0, 1.0)
FIXED = {"subsets": EVERY_ROW, "guard": None, "periods": Periods(inverses=1)}


def _mlp(*widths: int, seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(d_in, d_out))
    return nn.Sequential(*layers).double()


def _data(likelihood: Any, d_in: int, d_out: int, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, ng.Categorical):
        return x, torch.randint(d_out, (n,), generator=generator)
    y = torch.rand(n, d_out, generator=generator, dtype=torch.float64)
    return x, y


def _vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def _gradient(model: nn.Module, likelihood: Any, x: Tensor, y: Tensor, l2: float) -> Tensor:
    gradient = torch.autograd.grad(likelihood.nll(model(x), y), list(model.parameters()))
    return nn.utils.parameters_to_vector(gradient) + l2 * _vector(model)


def _dense_proposal(opt: ng.KFAC, model: nn.Module, gradient: Tensor, damping: float) -> Tensor:
    """−(F̆ + damping I)^{-1} ∇h layer by layer, with dense Kronecker products of the optimiser's averaged factors."""
    parts, offset = [], 0
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        o, i = layer.weight.shape
        W = gradient[offset : offset + o * i].view(o, i)
        b = gradient[offset + o * i : offset + o * i + o].view(o, 1)
        offset += o * i + o
        V = torch.cat([W, b], 1)
        factors = opt._running.factors[name]
        A, G = factors.A.to_dense(), factors.G.to_dense()
        if isinstance(opt.damping.form, ExactTikhonov):
            block = torch.kron(A, G) + damping * torch.eye(o * (i + 1), dtype=torch.float64)
        else:
            pi = math.sqrt((A.trace() / (i + 1)) / (G.trace() / o))
            root = math.sqrt(damping)
            eye_a, eye_g = torch.eye(i + 1, dtype=torch.float64), torch.eye(o, dtype=torch.float64)
            block = torch.kron(A + pi * root * eye_a, G + root / pi * eye_g)
        U = torch.linalg.solve(block, V.T.reshape(-1)).view(i + 1, o).T
        parts += [U[:, :i].reshape(-1), U[:, i]]
    return -torch.cat(parts)


LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_three_updates_equal_the_dense_reconstruction(likelihood: Any, form: Any, l2: float) -> None:
    model = _mlp(4, 3, 3)
    x, y = _data(likelihood, 4, 3)
    opt = ng.KFAC(model, likelihood, damping=Damping(0.3, form, LevenbergMarquardt(every=1, decay=0.9), ratio=1.5), l2=l2, **FIXED)
    previous, lam = torch.zeros_like(_vector(model)), 0.3
    for _ in range(3):
        before = _vector(model)
        gradient = _gradient(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        h_before = likelihood.nll(model(x), y).item() + 0.5 * l2 * before.square().sum().item()
        loss = opt.step(x, y)
        assert loss.item() == pytest.approx(h_before - 0.5 * l2 * before.square().sum().item(), rel=1e-12)
        delta = _vector(model) - before
        proposal = _dense_proposal(opt, model, gradient, 2.25 * (lam + l2))
        H = F + (lam + l2) * torch.eye(len(F), dtype=torch.float64)
        D = torch.stack([proposal, previous], 1) if previous.any() else proposal[:, None]
        c = torch.linalg.solve(D.T @ H @ D, -D.T @ gradient)
        torch.testing.assert_close(delta, D @ c, rtol=1e-8, atol=1e-10)
        change = (gradient @ delta + 0.5 * delta @ H @ delta).item()
        assert change == pytest.approx(0.5 * (gradient @ delta).item(), rel=1e-9)  # M(δ) − M(0) = ½ ∇h·δ
        h_after = likelihood.nll(model(x), y).item() + 0.5 * l2 * _vector(model).square().sum().item()
        rho = (h_after - h_before) / change
        assert opt.stats["rho"] == pytest.approx(rho, rel=1e-6)
        lam = lam * 0.9 if rho > 0.75 else lam / 0.9 if rho < 0.25 else lam
        assert opt.stats["lambda"] == pytest.approx(lam, rel=1e-12)
        previous = delta


def test_one_undamped_step_on_one_layer_is_newtons() -> None:
    model = _mlp(4, 2)
    likelihood = ng.Gaussian()
    x, y = _data(likelihood, 4, 2)
    start, gradient = _vector(model), _gradient(model, likelihood, x, y, 0.0)
    H = ng.Hessian(model, likelihood, x, y).to_dense()
    opt = ng.KFAC(model, likelihood, damping=Damping(0.0, rule=None), **FIXED)
    opt.step(x, y)
    torch.testing.assert_close(_vector(model), start - torch.linalg.solve(H, gradient), rtol=1e-9, atol=1e-10)
    assert opt.stats["alpha"] == pytest.approx(1.0, rel=1e-9)
    assert opt.stats["rho"] == pytest.approx(1.0, rel=1e-9)


def test_on_a_quadratic_momentum_is_preconditioned_conjugate_gradients() -> None:
    """[KFAC, sec. 7]: fixed quadratic, λ = 0 (η in h), γ fixed. The quadratic: a linear network of one layer, squared error."""
    likelihood, l2, gamma2 = ng.Gaussian(), 0.1, 3.0
    model = _mlp(5, 3)
    x, y = _data(likelihood, 5, 3, n=20)
    H = ng.Hessian(model, likelihood, x, y).to_dense() + l2 * torch.eye(18, dtype=torch.float64)
    theta, gradient = _vector(model), _gradient(model, likelihood, x, y, l2)
    # a preconditioner that is not the inverse of H: damped with a γ² that is not η
    rule = GreedyGamma(every=10**6)
    opt = ng.KFAC(model, likelihood, damping=Damping(0.0, ExactTikhonov(), None, rule), l2=l2, subsets=EVERY_ROW, guard=None,
                  periods=Periods(inverses=10**6, early=(1,)))  # fmt: skip
    opt._gamma = torch.tensor(math.sqrt(gamma2), dtype=torch.float64)
    residual, direction, last = -gradient, None, None
    for _ in range(6):
        opt.step(x, y)
        preconditioned = -_dense_proposal(opt, model, residual, gamma2)
        rz = residual @ preconditioned
        direction = preconditioned if direction is None else preconditioned + rz / last * direction
        alpha = rz / (direction @ H @ direction)
        theta, residual, last = theta + alpha * direction, residual - alpha * H @ direction, rz
        torch.testing.assert_close(_vector(model), theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_low_rank_form_gives_the_same_update(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = ng.Bernoulli()
    x, y = _data(likelihood, 9, 8, n=3)
    results = []
    for pays in (True, False):
        model = _mlp(9, 7, 8)
        monkeypatch.setattr("natgrad.optim.proposal.low_rank_pays", lambda *shape, pays=pays: pays)
        opt = ng.KFAC(model, likelihood, damping=Damping(0.5, FactoredTikhonov(), ratio=1.0), l2=l2, **FIXED)
        opt.step(x, y)
        results.append(_vector(model))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_fast_and_general_tangents_give_the_same_update() -> None:
    likelihood = ng.Categorical()
    x, y = _data(likelihood, 4, 3)
    results = []
    for forward in (None, lambda model, inputs: model(inputs)):
        model = _mlp(4, 5, 3, activation=nn.Sigmoid)
        opt = ng.KFAC(model, likelihood, damping=1.0, forward=forward, subsets=Subsets(0.3, 0.5))
        assert (opt.local.chain is None) == (forward is not None)
        for _ in range(3):
            opt.step(x, y)
        results.append(_vector(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["size", "iterable"])
def test_micro_batches_give_the_same_update(kind: str) -> None:
    likelihood = ng.Gaussian(normalizer="element")
    x, y = _data(likelihood, 6, 4, n=10)
    whole, split = _mlp(6, 4), _mlp(6, 4)  # one layer with a known G: nothing is sampled
    for model, arguments in (
        (whole, (x, y)),
        (split, (x, y, 3) if kind == "size" else ([(x[:4], y[:4]), (x[4:], y[4:])],)),
    ):
        opt = ng.KFAC(model, likelihood, damping=1.0, subsets=EVERY_ROW)
        loss = opt.step(*arguments)
        assert loss.item() == pytest.approx(likelihood.nll(_mlp(6, 4)(x), y).item(), rel=1e-12)
    torch.testing.assert_close(_vector(whole), _vector(split), rtol=1e-10, atol=1e-12)


def test_a_nan_batch_is_skipped_and_leaves_everything_as_it_was() -> None:
    likelihood = ng.Bernoulli()
    model = _mlp(5, 4, 3)
    x, y = _data(likelihood, 5, 3)
    opt = ng.KFAC(model, likelihood)
    for _ in range(3):
        opt.step(x, y)
    parameters = _vector(model)
    factors = {name: (f.A.to_dense().clone(), f.G.to_dense().clone()) for name, f in opt._running.factors.items()}
    lam = opt.stats["lambda"]
    bad = x.clone()
    bad[0, 0] = math.nan
    loss = opt.step(bad, y)
    assert math.isnan(loss.item())
    assert opt.stats["skipped"] == 1 and opt.stats["lambda"] == lam
    assert torch.equal(parameters, _vector(model))
    for name, (A, G) in factors.items():
        assert torch.equal(A, opt._running.factors[name].A.to_dense())
        assert torch.equal(G, opt._running.factors[name].G.to_dense())
    for _ in range(5):
        opt.step(x, y)
    assert opt.stats["skipped"] == 1
    assert torch.isfinite(_vector(model)).all() and not torch.equal(parameters, _vector(model))


def test_a_nan_batch_as_the_first_one_is_survived() -> None:
    likelihood = ng.Gaussian()
    model = _mlp(3, 3, 2)
    x, y = _data(likelihood, 3, 2)
    opt = ng.KFAC(model, likelihood)
    opt.step(x * math.nan, y)
    first = likelihood.nll(model(x), y).item()
    for _ in range(20):
        opt.step(x, y)
    assert opt.stats["skipped"] == 1
    assert likelihood.nll(model(x), y).item() < 0.5 * first


def test_a_rejected_update_keeps_the_parameters_and_raises_the_damping() -> None:
    likelihood = ng.Bernoulli()
    model = _mlp(5, 4, 3)
    x, y = _data(likelihood, 5, 3)
    opt = ng.KFAC(model, likelihood, damping=0.2, guard=StepGuard(threshold=1e6, raise_damping=1.5))
    before = _vector(model)
    opt.step(x, y)
    assert torch.equal(before, _vector(model))
    assert opt.stats["rejected"] == 1 and not opt.stats["accepted"]
    assert opt.stats["lambda"] == pytest.approx(0.3) and opt.stats["step_norm"] == 0


def test_learning_rate_multiplies_the_step() -> None:
    likelihood = ng.Gaussian()
    x, y = _data(likelihood, 4, 2)
    deltas = []
    for lr in (1.0, 0.25):
        model = _mlp(4, 3, 2)
        start = _vector(model)
        opt = ng.KFAC(model, likelihood, damping=1.0)
        opt.param_groups[0]["lr"] = lr
        opt.step(x, y)
        deltas.append(_vector(model) - start)
    torch.testing.assert_close(deltas[1], 0.25 * deltas[0], rtol=1e-10, atol=1e-14)


def test_gamma_rule_takes_the_best_of_three() -> None:
    likelihood = ng.Bernoulli()
    model = _mlp(5, 4, 3)
    x, y = _data(likelihood, 5, 3)
    settings = {"subsets": EVERY_ROW, "guard": None, "momentum": False, "periods": Periods(inverses=1)}
    opt = ng.KFAC(model, likelihood, damping=Damping(0.5, FactoredTikhonov(), None, GreedyGamma(every=2)), **settings)
    opt.step(x, y)
    gradient, F = _gradient(model, likelihood, x, y, 0.0), ng.Fisher(model, likelihood, x).to_dense()
    H = F + 0.5 * torch.eye(len(F), dtype=torch.float64)
    opt.step(x, y)
    gamma0, omega = math.sqrt(0.5), math.sqrt(0.95) ** 2
    quality = {}
    for gamma in (gamma0, gamma0 * omega, gamma0 / omega):
        d = _dense_proposal(opt, model, gradient, gamma**2)
        quality[gamma] = -0.5 * (gradient @ d).item() ** 2 / (d @ H @ d).item()
    assert opt.stats["gamma"] == pytest.approx(min(quality, key=quality.__getitem__), rel=1e-9)


def test_paper_constants() -> None:
    opt = ng.KFAC.paper(_mlp(3, 2), ng.Gaussian())
    assert (opt.damping.value, opt.l2, opt._running.decay) == (150.0, 1e-5, 0.95)
    assert opt.damping.rule == LevenbergMarquardt(every=5, decay=19 / 20, minimum=0.0)
    assert opt.damping.gamma == GreedyGamma(every=20, decay=19 / 20, quality="model", bounded=False)
    assert opt.damping.form == FactoredTikhonov("trace")
    assert (opt.subsets, opt.periods, opt.guard) == (Subsets(1 / 8, 1 / 4), Periods(20, (1, 2, 3)), None)


def test_batch_statistics_and_dropout_are_those_of_one_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)
    ).double()
    likelihood = ng.Gaussian()
    x, y = _data(likelihood, 5, 2, n=16)
    opt = ng.KFAC(model, likelihood, damping=1e6, guard=None)
    opt.step(x, y)
    assert model[1].num_batches_tracked.item() == 1  # the gradient pass alone moves the running statistics
    # a tiny step under a huge λ: the loss falls by ∇h·δ and M by half of it, if and only if the loss, the model and the trial
    # saw the same masks and the same normalisation
    assert opt.stats["rho"] == pytest.approx(2.0, abs=1e-4)


def test_uncovered_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match=r"1\.weight"):
        ng.KFAC(model, ng.Gaussian())
    x, y = _data(ng.Gaussian(), 4, 2)
    opt = ng.KFAC(model, ng.Gaussian(), uncovered="identity")
    first = ng.Gaussian().nll(model(x), y).item()
    for _ in range(30):
        opt.step(x, y)
    assert ng.Gaussian().nll(model(x), y).item() < 0.2 * first


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
    model = _mlp(4, 2)
    opt = ng.KFAC(model, likelihood, damping=0.1)
    for _ in range(30):
        opt.step(x, y)
    gradient = _gradient(model, likelihood, x, y, 0.0)
    assert gradient.norm() < 1e-4  # at the maximum of the likelihood


def test_one_example_and_single_precision() -> None:
    model = _mlp(4, 3, 2).float()
    x, y = torch.randn(1, 4), torch.rand(1, 2)
    opt = ng.KFAC(model, ng.Bernoulli())
    for _ in range(5):
        loss = opt.step(x, y)
    assert loss.dtype == torch.float32 and torch.isfinite(_vector(model)).all()


def test_bad_calls_are_explained() -> None:
    model = _mlp(4, 3)
    x, y = _data(ng.Gaussian(), 4, 3)
    opt = ng.KFAC(model, ng.Gaussian())
    before = _vector(model)
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
    assert torch.equal(before, _vector(model))
