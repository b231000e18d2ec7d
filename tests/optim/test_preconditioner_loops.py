"""What training loops do around a preconditioner: accumulate, reduce, scale, clip, average weights, compile."""

import copy
from typing import Any

import pytest
import torch
from oracles.classifier import LIKELIHOOD, blobs, train
from oracles.classifier import mlp as classifier
from oracles.preconditioning import batch, damped_solve, exact, fisher, gradient, mlp, plain, targets, train_once
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.damping import FactoredTikhonov

TOKENS = ng.Categorical("element", ignore_index=-1)


def sequences() -> tuple[Tensor, Tensor]:
    """Six sequences of five positions; between one and five of them count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6, 5), generator=generator)
    for n, length in enumerate((1, 5, 2, 4, 3, 5)):
        y[n, length:] = -1
    return x, y


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "factored": {"form": FactoredTikhonov()},
    "ekfac": {"structure": "ekfac", "form": None},
    "input_covariance": {"structure": "input_covariance", "form": None},
    "empirical": {"expectation": "empirical"},
    "grafted": {"scaling": ng.Grafting()},
    "clipped": {"scaling": ng.KLClip(1e-3)},
}


def accumulated(sizes: list[int], loss_of: Any, pre_of: Any) -> Tensor:
    """Two steps' gradients, of micro-batches of so many sequences."""
    x, y = sequences()
    model = mlp(4, 5, 3)
    pre = pre_of(model)
    for _ in range(2):
        model.zero_grad()
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            z = model(xs)
            pre.observe(z, ys)
            loss_of(z, ys).backward()
        pre.step()
    return gradient(model)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sizes", [[1, 2, 3], [3, 2, 1]])
def test_micro_batches_of_unequal_token_counts_are_one_batch(name: str, sizes: list[int]) -> None:
    """Every micro-batch's loss is its sum over the tokens of the whole batch, 20 of them count."""

    def loss_of(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum") / 20

    def pre_of(model: nn.Module) -> ng.Preconditioner:
        return exact(model, TOKENS, **SETTINGS[name])

    whole = accumulated([6], loss_of, pre_of)
    torch.testing.assert_close(accumulated(sizes, loss_of, pre_of), whole, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_mean_and_sum_give_the_same_direction(name: str) -> None:
    """The curvature is the likelihood's, whatever the loss is multiplied by; a bounded step is the same altogether."""

    def loss_of(reduction: str) -> Any:
        return lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-1, reduction=reduction)

    mean, total = (accumulated([6], loss_of(r), lambda m: exact(m, TOKENS, **SETTINGS[name])) for r in ("mean", "sum"))
    scale = 1.0 if name == "clipped" else 20.0
    torch.testing.assert_close(total, scale * mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "factored", "ekfac"])
def test_a_likelihood_that_is_a_sum_wants_as_many_times_the_damping(name: str) -> None:
    """``(20 F + 20 λ I)^{-1} 20 ∇ = (F + λ I)^{-1} ∇``."""
    y = sequences()[1]
    total = ng.Categorical("none", ignore_index=-1)
    found = []
    for likelihood, factor in ((TOKENS, 1), (total, 20)):
        pre_of = lambda m, lik=likelihood, c=factor: exact(m, lik, **SETTINGS[name] | {"damping": 0.1 * c})  # noqa: E731
        found.append(accumulated([6], likelihood.nll, pre_of))
    assert (y != -1).sum() == 20
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


class Biasless(nn.Module):
    """Layers without biases, whose sums are plain matrix products."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6, bias=False) if linear else nn.Conv1d(4, 6, 1, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if isinstance(self.first, nn.Linear) else x[..., None]
        return self.head(torch.tanh(self.first(x)).flatten(1))


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "input_covariance"])
@pytest.mark.parametrize("how", ["observe", "update", "empirical"])
def test_statistics_keep_single_precision_inside_autocast(structure: str, how: str) -> None:
    """Products under autocast would round sums over 600 rows to the eight bits of a bfloat16."""
    model, x, y = Biasless(structure == "input_covariance"), batch(600, dtype=torch.float32), targets(LIKELIHOOD, 600)
    found = []
    for inside in (False, True):
        pre = exact(
            model,
            LIKELIHOOD,
            structure=structure,
            form=None,
            expectation="empirical" if how == "empirical" else "exact",
        )
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = model(x)
                loss = LIKELIHOOD.nll(z.float(), y)
                if inside or how == "update":
                    pre.update(x, y) if how == "update" else pre.observe(z, y)
            if not inside and how != "update":
                pre.observe(z, y)
            loss.backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                pre.step()
        found.append((pre._running.factors, gradient(model)))
    (outside, g), (inside, h) = found
    for name, factors in outside.items():
        assert inside[name].to_dense().dtype == torch.float32
        assert torch.equal(inside[name].to_dense(), factors.to_dense())
    assert torch.equal(g, h)
    rows = x.T @ x / 600  # the first layer's input is not rounded
    torch.testing.assert_close(inside["first"].A, rows, rtol=1e-5, atol=1e-6)


def test_autocast_grad_scaler_and_clipping_train() -> None:
    """float16 is not for CPUs: bfloat16 with a scaler, as on a GPU."""
    model = classifier(20, 32, 8)
    pre = ng.Preconditioner(model, LIKELIHOOD)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = []
    inner.register_step_pre_hook(lambda *_: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()))
    optimizer, scaler = ng.Preconditioned(inner, pre), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = blobs()
    for epoch in range(2):
        for rows in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(100):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = model(x[rows])
                pre.observe(z)
                loss = LIKELIHOOD.nll(z.float(), y[rows])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert sum(p.grad.square().sum() for p in model.parameters()).sqrt() <= 0.5 * 1.001
    assert len(norms) == 24 and max(norms) > 0.5  # what is clipped is the preconditioned gradient
    assert (model(x).argmax(1) == y).float().mean() > 0.8
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert pre.state_dict()["layers"]["0"]["A"].dtype == torch.float32


def test_a_grad_scaler_that_finds_an_overflow_skips_the_step() -> None:
    x, y = (t[:100] for t in blobs())
    for wrapped in (True, False):
        model = classifier(20, 32, 8)
        pre = ng.Preconditioner(model, LIKELIHOOD)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = ng.Preconditioned(inner, pre) if wrapped else inner
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        for overflow in (False, True, False):
            now = nn.utils.parameters_to_vector(model.parameters()).detach()
            optimizer.zero_grad()
            z = model(x)
            pre.observe(z)
            scaler.scale(LIKELIHOOD.nll(z, y)).backward()
            if overflow:
                model[0].weight.grad[0, 0] = torch.inf
            if not wrapped:
                scaler.unscale_(optimizer)
                pre.step()
            scaler.step(optimizer)
            scaler.update()
            moved = not torch.equal(nn.utils.parameters_to_vector(model.parameters()), now)
            assert moved != overflow
        assert scaler.get_scale() == 2.0**3
        assert pre.stats["skipped"] == 0 and pre.stats["nonfinite"] == (0 if wrapped else 1)
        assert torch.isfinite(nn.utils.parameters_to_vector(model.parameters())).all()
        assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))


def test_clipping_after_the_preconditioner() -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    U = train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(gradient(model), U * 0.1 / U.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    """Gradients that are None and gradients that are zero mean the same; parameters without one are passed over."""
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    expected = train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    pre = exact(model, LIKELIHOOD)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.0), pre)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none for p in model.parameters())
        z = model(x)
        pre.observe(z)
        LIKELIHOOD.nll(z, y).backward()
        optimizer.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-10, atol=1e-14)
    model[0].weight.grad = None  # the bias's row of the joint block, W having no gradient of its own
    LIKELIHOOD.nll(model(x), y)
    model[0].bias.grad = torch.ones(3, dtype=torch.float64)
    pre.precondition()
    A, G = (fisher(model, LIKELIHOOD, x).factors["0"].A, fisher(model, LIKELIHOOD, x).factors["0"].G)
    V = torch.zeros(3, 5, dtype=torch.float64)
    V[:, 4] = 1
    U = damped_solve(torch.kron(A, G), 0.1, V.T.reshape(-1)).view(5, 3).T
    assert model[0].weight.grad is None
    torch.testing.assert_close(model[0].bias.grad, U[:, 4], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_uncovered_parameters_take_the_inner_optimisers_own_step(inner: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 3)).double()
    twin, x, y = copy.deepcopy(model), batch(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD, uncovered="identity")
    optimizers = [ng.Preconditioned(inner(model.parameters(), lr=0.1), pre), inner(twin.parameters(), lr=0.1)]
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        z = net(x)
        if net is model:
            pre.observe(z)
        LIKELIHOOD.nll(z, y).backward()
        optimizer.step()
    assert torch.equal(model[1].weight, twin[1].weight)
    assert not torch.equal(model[0].weight, twin[0].weight)


def test_weight_averages_and_copies_of_a_model_in_training() -> None:
    """The copies' forward passes feed nobody's statistics, and what is averaged is what is trained."""
    results = []
    for averaged in (True, False):
        model = classifier(20, 32, 8)
        pre = ng.Preconditioner(model, LIKELIHOOD)
        optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), pre)
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        x, y = blobs()
        mean = nn.utils.parameters_to_vector(model.parameters()).detach()
        for k, rows in enumerate(torch.arange(1200).split(100)):
            optimizer.zero_grad()
            z = model(x[rows])
            if averaged:
                ema(x[rows])
                copy.deepcopy(model)(x[rows]).sum().backward()
            pre.observe(z)
            LIKELIHOOD.nll(z, y[rows]).backward()
            optimizer.step()
            ema.update_parameters(model)
            now = nn.utils.parameters_to_vector(model.parameters()).detach()
            mean = now if k == 0 else 0.9 * mean + 0.1 * now
        torch.testing.assert_close(nn.utils.parameters_to_vector(ema.module.parameters()), mean, rtol=1e-5, atol=1e-6)
        results.append(now)
    assert torch.equal(*results)


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_model_compiled_in_place(made: str) -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    expected = train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    model.zero_grad()
    pre = exact(model, LIKELIHOOD) if made == "before" else None
    model.compile(backend="aot_eager")
    model(x)
    pre = pre or exact(model, LIKELIHOOD)
    z = model(x)
    with pytest.raises(RuntimeError, match=r"for a compiled model.*call update\(x\)"):
        pre.observe(z)
    pre.update(x)
    LIKELIHOOD.nll(z, y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


def test_other_learning_rates_by_group_and_a_scheduler() -> None:
    """Groups of the inner optimiser by layer; a scheduler scales them all."""
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    U = train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    pre = exact(model, LIKELIHOOD)
    optimizer = ng.Preconditioned(torch.optim.SGD(groups), pre)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    model.zero_grad()
    pre.update(x)
    LIKELIHOOD.nll(model(x), y).backward()
    optimizer.step()
    scheduler.step()
    rates = torch.tensor([0.05] * 15 + [0.005] * 12, dtype=torch.float64)
    now = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(now, before - rates * U, rtol=1e-10, atol=1e-12)


def test_grafting_trains_at_the_learning_rate_of_sgd() -> None:
    """The same rate as SGD's, without a bound of its own: higher accuracy after as many steps."""
    found = []
    for graft in (False, True):
        model = classifier(20, 32, 8)
        inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        pre = ng.Preconditioner(model, LIKELIHOOD, scaling=ng.Grafting(), damping=1e-2) if graft else None
        optimizer = inner if pre is None else ng.Preconditioned(inner, pre)
        found.append(train(model, optimizer, pre, 2))
    assert found[1][-1] > found[0][-1] and found[1][-1] > 0.9
    assert plain(mlp(4, 3), LIKELIHOOD, batch(), targets(LIKELIHOOD)).isfinite().all()
