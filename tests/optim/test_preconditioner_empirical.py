"""expectation="empirical": the loss's own backward pass gives the statistics, whatever the loss is multiplied by."""

from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, damped_solve, exact, gradient, mlp, plain, targets, train_once
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad as ng

LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]
CATEGORICAL = ng.Categorical()


def empirical(model: nn.Module, likelihood: Any = CATEGORICAL, **settings: Any) -> ng.Preconditioner:
    return exact(model, likelihood, expectation="empirical", **settings)


def per_example(model: nn.Module, likelihood: Any, x: Tensor, y: Tensor) -> Tensor:
    """The summed nll's gradient of every example, by a loop."""
    rows = []
    for n in range(len(x)):
        loss = likelihood.nll(model(x[n : n + 1]), y[n : n + 1], count=1)
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(nn.utils.parameters_to_vector(found))
    return torch.stack(rows)


def observed(model: nn.Module, pre: ng.Preconditioner, likelihood: Any, x: Any, y: Any, scale: float = 1.0) -> Tensor:
    """One step of a loss that is a multiple of the nll; the preconditioned gradient over that multiple."""
    model.zero_grad()
    z = model(x)
    pre.observe(z, y)
    (scale * likelihood.nll(z, y)).backward()
    pre.step()
    return gradient(model) / scale


class Counted(torch.autograd.Function):
    """The identity; counts backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyrefly: ignore
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyrefly: ignore
        Counted.passes += 1
        return g


class Counting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return Counted.apply(self.model(x))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("scale", [1.0, 1 / 480, 2.0**16])
def test_factors_are_those_of_the_targets_whatever_the_loss_is_multiplied_by(likelihood: Any, scale: float) -> None:
    """Mean or sum, one over the number of micro-batches, a GradScaler's scale: the curvature is the likelihood's."""
    model, x, y = mlp(4, 3), batch(), targets(likelihood)
    pre = empirical(model, likelihood)
    found = observed(model, pre, likelihood, x, y, scale)
    G = per_example(model, likelihood, x, y)[:, -3:]  # of the biases: g itself
    ones = torch.cat([x, torch.ones(12, 1, dtype=x.dtype)], 1)
    A, G = ones.T @ ones / 12, G.T @ G / 12
    factors = pre._running.factors["0"]
    torch.testing.assert_close(factors.A, A, rtol=1e-10, atol=0)
    torch.testing.assert_close(factors.G, G, rtol=1e-9, atol=1e-14)
    g = plain(model, likelihood, x, y)
    V = torch.cat([g[:12].view(3, 4), g[12:, None]], 1)
    U = damped_solve(torch.kron(A, G), 0.1, V.T.reshape(-1)).view(5, 3).T
    torch.testing.assert_close(found, torch.cat([U[:, :4].reshape(-1), U[:, 4]]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac"])
@pytest.mark.parametrize("how", ["whole", "micro-batches", "late backward"])
def test_equals_a_pass_of_its_own(structure: str, how: str) -> None:
    """`update` computes the same by a pass of its own; three steps, so that EKFAC has second moments."""
    results = []
    for own in (True, False):
        model, y = mlp(4, 5, 3, activation=lambda: nn.ReLU(inplace=True)), targets(CATEGORICAL)
        pre = empirical(model, structure=structure, form=None)
        for seed in range(3):
            x = batch(seed=seed)
            model.zero_grad()
            losses = []
            for rows in torch.arange(12).split(12 if how == "whole" else 5):
                z = model(x[rows])
                pre.update(x[rows], y[rows]) if own else pre.observe(z, y[rows])
                losses.append(CATEGORICAL.nll(z, y[rows]) * len(rows) / 12)
                if how != "late backward":
                    losses.pop().backward()
            if losses:
                torch.stack(losses).sum().backward()
            pre.step()
        results.append(gradient(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_there_is_no_backward_pass_of_its_own() -> None:
    inner, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    model = Counting(inner)
    for expectation, passes in (("empirical", 1), ("sampled", 2)):
        pre = exact(model, CATEGORICAL, expectation=expectation)
        for _ in range(2):
            Counted.passes = 0
            z = model(x)
            pre.observe(z, y)
            CATEGORICAL.nll(z, y).backward()
            pre.step()
            assert Counted.passes == passes


class Twice(nn.Module):
    """A convolution used twice, norms, an embedding's relative: kinds with rules of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(2, 2, 3, padding=1), nn.GroupNorm(1, 2)
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(torch.tanh(self.conv(x)))).mT
        return self.head(self.attention(h, h, h)[0].flatten(1))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_kind_of_layer(checkpointed: bool) -> None:
    model, x = Twice(), torch.randn(6, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = targets(CATEGORICAL, 6)
    pre = empirical(model)

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    z = call(x)
    pre.observe(z, y)
    CATEGORICAL.nll(z, y).backward()
    pre.step()
    expected = ng.kronecker_fisher(model, CATEGORICAL, x, y=y, expectation="empirical")
    assert pre.coverage().layers.keys() == expected.factors.keys() and len(expected.factors) == 5
    for name, factors in expected.factors.items():
        found = pre._running.factors[name]
        torch.testing.assert_close(found.to_dense(), factors.to_dense(), rtol=1e-8, atol=1e-13)


def test_inputs_that_are_reused_after_the_backward_pass() -> None:
    model, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    expected = observed(model, empirical(model), CATEGORICAL, x, y)
    pre = empirical(model)
    model.zero_grad()
    z = model(x)
    pre.observe(z, y)
    CATEGORICAL.nll(z, y).backward()
    x.zero_()  # a loader's buffer
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=0, atol=0)


def test_ignored_targets_and_weights() -> None:
    likelihood = ng.Categorical("element", ignore_index=0)
    model, x = mlp(4, 3), batch()
    y = torch.tensor([0, 1, 2] * 4)
    pre = empirical(model, likelihood)
    for rows in (slice(0, 1), slice(1, 12)):  # of the first micro-batch every target is ignored
        z = model(x[rows])
        pre.observe(z, y[rows])
        (likelihood.nll(z, y[rows], count=8)).backward()
    pre.step()
    g = model(x).softmax(1).detach() - nn.functional.one_hot(y, 3)
    g[y == 0] = 0
    torch.testing.assert_close(pre._running.factors["0"].G, g.T @ g / 12, rtol=1e-9, atol=1e-14)
    assert pre.stats["skipped"] == 0
    gaussian, weight = ng.Gaussian(), torch.linspace(0, 2, 12, dtype=torch.float64)
    y, pre = targets(gaussian), empirical(model, gaussian)
    z = model(x)
    pre.observe(z, y, weight=weight)
    gaussian.nll(z, y, weight=weight).backward()
    pre.step()
    g = (z - y).detach() * weight[:, None]
    torch.testing.assert_close(pre._running.factors["0"].G, g.T @ g / 12, rtol=1e-9, atol=1e-14)


def test_a_grad_scaler_and_autocast() -> None:
    """bfloat16 has eight bits: the scale is found from all of z, so that the factors keep a per cent."""
    model, x, y = mlp(4, 16, 3).float(), batch(200, dtype=torch.float32), targets(CATEGORICAL, 200)
    expected = ng.kronecker_fisher(model, CATEGORICAL, x, y=y, expectation="empirical").factors
    pre = empirical(model)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.1), pre)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(x)
        pre.observe(z, y)
        loss = CATEGORICAL.nll(z.float(), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, factors in expected.items():
        found = pre._running.factors[name]
        assert found.G.dtype == torch.float32
        assert (found.A - factors.A).norm() < 0.01 * factors.A.norm()
        assert (found.G - factors.G).norm() < 0.02 * factors.G.norm()
    assert pre.stats["skipped"] == pre.stats["bare"] == 0


def test_another_loss_than_the_likelihoods_is_an_error() -> None:
    model, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    pre = empirical(model)
    for wrong in (
        lambda z: (z.softmax(1) - nn.functional.one_hot(y, 3)).square().mean(),
        lambda z: nn.functional.cross_entropy(z, y, weight=torch.tensor([1.0, 5.0, 0.2], dtype=z.dtype)),
        lambda z: -CATEGORICAL.nll(z, y),
    ):
        model.zero_grad()
        z = model(x)
        pre.observe(z, y)
        wrong(z).backward()
        before = gradient(model)
        with pytest.raises(ValueError, match=r"not proportional to likelihood\.nll.*expectation='sampled'"):
            pre.step()
        assert torch.equal(gradient(model), before) and not pre._running.factors
    expected = observed(model, empirical(model), CATEGORICAL, x, y)
    torch.testing.assert_close(observed(model, pre, CATEGORICAL, x, y), expected, rtol=1e-12, atol=0)


def test_a_backward_pass_that_is_missing_or_in_part_is_an_error() -> None:
    model, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    pre = empirical(model)
    CATEGORICAL.nll(model(x), y).backward()
    with pytest.raises(ValueError, match="empirical.*y="):
        pre.observe(model(x))
    pre.observe(model(x), y)
    with pytest.raises(RuntimeError, match=r"off loss\.backward\(\): call observe\(z, y\), then backward"):
        pre.step()
    z = model(x)
    pre.observe(z, y)
    CATEGORICAL.nll(z, y).backward(inputs=list(model[2].parameters()))
    with pytest.raises(RuntimeError, match=r"layer '0': loss\.backward\(\) did not reach"):
        pre.step()
    z = model(x)  # a second backward pass through the same graph counts once
    pre.observe(z, y)
    CATEGORICAL.nll(z, y).backward(retain_graph=True)
    CATEGORICAL.nll(z, y).backward()
    pre.step()
    expected = empirical(model)
    observed(model, expected, CATEGORICAL, x, y)
    for name, factors in expected._running.factors.items():
        torch.testing.assert_close(pre._running.factors[name].G, factors.G, rtol=1e-12, atol=0)


def test_nothing_stays_on_the_graph() -> None:
    import gc
    import weakref

    model, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    pre = empirical(model)
    z = model(x)
    pre.observe(z, y)
    batch_of = weakref.ref(pre._pending._open[0])
    pre.skip()
    gc.collect()
    assert batch_of() is None and pre.stats.get("skipped") is None
    CATEGORICAL.nll(z, y).backward()  # the hooks are gone
    z = model(x)
    pre.observe(z, y)
    CATEGORICAL.nll(z, y).backward()
    (kept,) = pre._pending._open
    assert kept.complete and kept._passing is None and not kept._uses and not kept._gradients


def test_bare_parameters_need_a_pass_of_their_own() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = mlp(4, 3), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.scale

    model, x, y = Bare(), batch(), targets(CATEGORICAL)
    pre = empirical(model)
    found = train_once_with(model, pre, x, y)
    F = ng.kronecker_fisher(model, CATEGORICAL, x, y=y, expectation="empirical")
    expected = F.inverse(damping=0.1, kind="exact") @ plain(model, CATEGORICAL, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def train_once_with(model: nn.Module, pre: ng.Preconditioner, x: Tensor, y: Tensor) -> Tensor:
    return observed(model, pre, CATEGORICAL, x, y)


def test_what_the_empirical_fisher_loses() -> None:
    """Where the model fits its targets the empirical Fisher vanishes; the Fisher matrix does not."""
    gaussian, x = ng.Gaussian(), batch()
    model = mlp(4, 3)
    y = model(x).detach() + 1e-3 * torch.randn(12, 3, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    found = empirical(model, gaussian)
    observed(model, found, gaussian, x, y)
    true = exact(model, gaussian)
    train_once(model, true, gaussian, x, y)
    assert found._running.factors["0"].G.trace() < 1e-5 and true._running.factors["0"].to_dense().trace() > 10
