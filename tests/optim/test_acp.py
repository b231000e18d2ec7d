"""ACP against dense inverses of ``A ⊗ α I`` with the bias row, and against the closed form of the local criterion."""

import copy
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, mlp, targets
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.centered import local_solution

GAUSSIAN = ng.Gaussian()


def layer_rows(model: nn.Sequential, likelihood: Any, x: Tensor, y: Any) -> list[tuple[nn.Linear, Tensor, Tensor]]:
    """(layer, h, per-example ∇_a l) of every linear layer, by automatic differentiation."""
    found, outputs, h = [], [], x
    for module in model:
        if isinstance(module, nn.Linear):
            found.append((module, h.detach()))
        h = module(h)
        if isinstance(module, nn.Linear):
            outputs.append(h)
    gradients = torch.autograd.grad(likelihood.nll(h, y) * len(x), outputs)  # n times: not divided by n
    return [(*pair, g) for pair, g in zip(found, gradients, strict=True)]


def dense_step(
    h: Tensor, g: Tensor, alpha: float, damping: float, damp_bias: bool, n: int, stale: Tensor | None = None
) -> Tensor:
    """``(A ⊗ α I + λ I)^{-1} ∇`` as a matrix [ΔW Δb]; C of ``stale`` rows where they are given."""
    h, g = h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1])
    ones = h.new_ones(len(h), 1)
    A = torch.cat([h, ones], 1).T @ torch.cat([h, ones], 1) / n
    if stale is not None:
        mean = h.mean(0)
        A[:-1, :-1] = torch.cov(stale.T, correction=0) + torch.outer(mean, mean)
    diagonal = torch.ones(len(A), dtype=h.dtype)
    diagonal[-1] = float(damp_bias)
    out = g.shape[1]
    F = torch.kron(alpha * A + damping * torch.diag(diagonal), torch.eye(out, dtype=h.dtype))
    gradient = (g.T @ torch.cat([h, ones], 1) / n).T.reshape(-1)
    return torch.linalg.solve(F, gradient).reshape(-1, out).T


@pytest.mark.parametrize("likelihood", [GAUSSIAN, ng.Bernoulli(normalizer="element"), ng.Categorical()], ids=repr)
@pytest.mark.parametrize("damp_bias", [True, False])
@pytest.mark.parametrize("alpha", [0.8, "max"])
@pytest.mark.parametrize("examples", [None, 12])
def test_the_step_equals_the_dense_inverse(
    likelihood: Any, damp_bias: bool, alpha: float | str, examples: int | None
) -> None:
    widths = (30, 26, 3) if examples else (4, 5, 3)  # wide: twelve rows give the low-rank form
    model, x, y = mlp(*widths), batch(d=widths[0]) + 0.7, targets(likelihood)
    rows = layer_rows(model, likelihood, x, y)
    before = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer, _, _ in rows]
    opt = ng.ACP(model, likelihood, lr=0.5, alpha=alpha, damping=0.3, damp_bias=damp_bias, examples=examples)
    loss = likelihood.nll(model(x), y)
    torch.testing.assert_close(opt.step(x, y), loss.detach(), rtol=1e-12, atol=0)
    alphas = []
    for (layer, h, g), (W, b) in zip(rows, before, strict=True):
        alphas.append(float(g.square().max()) if alpha == "max" else 0.8)
        expected = dense_step(h, g, alphas[-1], 0.3, damp_bias, len(x))
        torch.testing.assert_close(W - layer.weight, 0.5 * expected[:, :-1], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(b - layer.bias, 0.5 * expected[:, -1], rtol=1e-8, atol=1e-11)
    assert alpha == 0.8 or alphas[0] != alphas[1]
    low = ["basis" in opt.state[layer.weight] for layer, _, _ in rows]
    assert low == [examples is not None] * 2


@pytest.mark.parametrize("damp_bias", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_between_renewals_the_covariance_is_kept_and_the_mean_is_not(damp_bias: bool, momentum: float) -> None:
    model, y = mlp(4, 3), targets(GAUSSIAN)
    layer = model[0]
    opt = ng.ACP(model, GAUSSIAN, lr=0.2, alpha=0.5, damping=0.1, damp_bias=damp_bias, every=3, momentum=momentum)
    velocity = torch.zeros(3, 5, dtype=torch.float64)
    for k in range(5):
        x = (1 + 0.2 * k) * batch(seed=k) + 0.3 * k
        if k % 3 == 0:
            stale = x
        ((_, h, g),) = layer_rows(model, GAUSSIAN, x, y)
        old = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
        velocity = momentum * velocity + dense_step(h, g, 0.5, 0.1, damp_bias, len(x), stale)
        opt.step(x, y)
        new = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        torch.testing.assert_close(old - new, 0.2 * velocity, rtol=1e-9, atol=1e-12)


def test_the_minimiser_of_the_local_criterion() -> None:
    """ε = κ = λ/α and an undamped bias [THESIS, sec. 6.1]; the step is −λ_lr/α times it."""
    model, x, y = mlp(4, 5, 3), batch() + 1, targets(GAUSSIAN)
    rows = layer_rows(model, GAUSSIAN, x, y)
    before = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer, _, _ in rows]
    ng.ACP(model, GAUSSIAN, lr=0.3, alpha=2.0, damping=0.5, damp_bias=False).step(x, y)
    for (layer, h, g), (W, b) in zip(rows, before, strict=True):
        expected = local_solution(h, g, lr=0.3 / 2.0, damping=0.5 / 2.0)
        torch.testing.assert_close(layer.weight - W, expected.weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.bias - b, expected.bias, rtol=1e-9, atol=1e-12)


def test_the_plain_bias_update() -> None:
    model, x, y = mlp(4, 3), batch() + 1, targets(GAUSSIAN)
    full = copy.deepcopy(model)
    ((_, _, g),) = layer_rows(model, GAUSSIAN, x, y)
    bias = model[0].bias.detach().clone()
    ng.ACP(model, GAUSSIAN, lr=0.3, alpha=2.0, plain_bias=True).step(x, y)
    ng.ACP(full, GAUSSIAN, lr=0.3, alpha=2.0).step(x, y)
    torch.testing.assert_close(bias - model[0].bias, 0.3 / 2.0 * g.mean(0), rtol=1e-11, atol=1e-13)
    assert torch.equal(full[0].weight, model[0].weight)


@pytest.mark.parametrize("frozen", ["no bias", "bias", "weight"])
def test_a_block_holds_what_is_trained(frozen: str) -> None:
    model, x, y = mlp(4, 3), batch() + 1, targets(GAUSSIAN)
    if frozen == "no bias":
        model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    elif frozen == "bias":
        model[0].bias.requires_grad_(False)
    else:
        model[0].weight.requires_grad_(False)
    ((layer, h, g),) = layer_rows(model, GAUSSIAN, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    F = ng.kronecker_fisher(model, GAUSSIAN, x, structure="input_covariance", alpha=0.7)
    gradient = torch.cat(
        [
            p.reshape(-1)
            for p in torch.autograd.grad(GAUSSIAN.nll(model(x), y), [p for p in model.parameters() if p.requires_grad])
        ]
    )
    expected = F.inverse(damping=0.2) @ gradient
    ng.ACP(model, GAUSSIAN, lr=1.0, alpha=0.7, damping=0.2).step(x, y)
    moved = torch.cat(
        [(b - p.detach()).reshape(-1) for b, p in zip(before, model.parameters(), strict=True) if p.requires_grad]
    )
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def test_sequences_and_micro_batches() -> None:
    model = mlp(4, 5, 3)
    x = batch(n=24).reshape(6, 4, 4) + 0.5
    y = batch(n=24, d=3, seed=5).reshape(6, 4, 3)
    other = copy.deepcopy(model)
    rows = layer_rows(model, GAUSSIAN, x, y)
    before = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone() for layer, _, _ in rows]
    ng.ACP(model, GAUSSIAN, lr=1.0, alpha="max", damping=0.3).step(x, y)
    ng.ACP(other, GAUSSIAN, lr=1.0, alpha="max", damping=0.3).step(x, y, micro_batch_size=4)
    for (layer, h, g), old in zip(rows, before, strict=True):
        expected = dense_step(h, g, float(g.square().max()), 0.3, True, 6)
        new = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        torch.testing.assert_close(old - new, expected, rtol=1e-8, atol=1e-11)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_what_has_no_inverse_takes_a_plain_step_and_other_parameters_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    x, y = batch(), targets(GAUSSIAN)
    x[:, 1] = 2.0
    with pytest.raises(ValueError, match="1.weight"):
        ng.ACP(model, GAUSSIAN)
    opt = ng.ACP(model, GAUSSIAN, lr=0.1, damping=0.0, uncovered="identity")
    gradients = torch.autograd.grad(GAUSSIAN.nll(model(x), y), list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(x, y)
    assert opt.stats["bare"] == 1 and opt.stats["failed_inverses"] == 1
    for old, p, gradient in zip(before, model.parameters(), gradients, strict=True):
        torch.testing.assert_close(old - p, 0.1 * gradient, rtol=1e-10, atol=1e-13)
    opt.step(batch(seed=3), y)
    assert opt.stats["bare"] == 0


def test_float32_trains_and_bfloat16_does_too() -> None:
    y = targets(GAUSSIAN).float()
    for dtype in (torch.float32, torch.bfloat16):
        model, x = mlp(4, 8, 3).to(dtype), batch().to(dtype)
        opt = ng.ACP(model, GAUSSIAN, lr=0.2, alpha=1.0, damping=0.1, every=2)
        losses = [float(opt.step(x, y.to(dtype))) for _ in range(30)]
        assert losses[-1] < 0.5 * losses[0] and model[0].weight.dtype == dtype
        again = ng.ACP(model, GAUSSIAN, lr=0.2, alpha=1.0, damping=0.1, every=2)
        again.load_state_dict(opt.state_dict())
        assert again.state[model[0].weight]["inverse"].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": "mean"}, "alpha='mean': expected a positive number or 'max'"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"every": 0}, "every=0"),
        ({"examples": 0}, "examples=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"uncovered": "diagonal"}, "uncovered='diagonal'"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.ACP(mlp(4, 3), GAUSSIAN, **settings)


def test_a_state_of_another_form_is_refused() -> None:
    model, y = mlp(30, 3), targets(GAUSSIAN)
    opt = ng.ACP(model, GAUSSIAN)
    opt.step(batch(d=30), y)
    other = ng.ACP(model, GAUSSIAN, examples=12)
    with pytest.raises(ValueError, match=r"layer '0' needs 'basis' of shape \(30, 12\)"):
        other.load_state_dict(opt.state_dict())
