"""Preconditioned gradients against dense inverses in float64, and every situation that is known to fool hooks."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.optim.settings import Periods

EVERY_STEP = ng.Renewal(inverses=1, statistics=1)


def mlp(*widths: int, activation: Any = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(d_in, d_out))
    return nn.Sequential(*layers).double()


def batch(n: int = 12, d: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def targets(likelihood: Any, n: int = 12, outputs: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(likelihood, ng.Categorical):
        return torch.randint(outputs, (n,), generator=generator)
    return torch.rand(n, outputs, generator=generator, dtype=torch.float64)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])


def plain(model: nn.Module, likelihood: Any, x: Any, y: Any) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(likelihood.nll(model(x), y), parameters)
    return nn.utils.parameters_to_vector(found)


def exact(model: nn.Module, likelihood: Any, **settings: Any) -> ng.Preconditioner:
    """No sampling and no scaling: everything can be compared with a dense twin."""
    given = {"expectation": "exact", "scaling": None, "periods": EVERY_STEP, "damping": 0.1, "form": ExactTikhonov()}
    return ng.Preconditioner(model, likelihood, **given | settings)


def fisher(model: nn.Module, likelihood: Any, x: Any, **settings: Any) -> Any:
    given = {"structure": "block_diagonal", "expectation": "exact", **settings}
    return ng.kronecker_fisher(model, likelihood, x, **given)


def train_once(model: nn.Module, pre: ng.Preconditioner, likelihood: Any, x: Any, y: Any) -> Tensor:
    model.zero_grad()
    z = model(x)
    loss = likelihood.nll(z, y)
    pre.observe(z)
    loss.backward()
    pre.step()
    return gradient(model)


def damped_solve(F: Tensor, damping: float, g: Tensor) -> Tensor:
    return torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), g)


LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
def test_exact_damping_equals_the_dense_inverse(likelihood: Any) -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    torch.testing.assert_close(train_once(model, pre, likelihood, x, y), damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    pre.damping = 0.3  # no new decomposition is needed
    model.zero_grad()
    likelihood.nll(model(x), y).backward()
    pre.precondition()
    torch.testing.assert_close(gradient(model), damped_solve(F, 0.3, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pi", ["trace", "frobenius", "one"])
def test_factored_damping_equals_the_dense_inverse(pi: str) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    g, factors = plain(model, likelihood, x, y), fisher(model, likelihood, x).factors
    found = train_once(model, exact(model, likelihood, form=FactoredTikhonov(pi=pi)), likelihood, x, y)
    expected, offset, root = [], 0, math.sqrt(0.1)
    for name, (o, i) in {"0": (3, 4), "2": (3, 3)}.items():
        A, G = factors[name].A.to_dense(), factors[name].G.to_dense()
        norm = {"trace": lambda M: M.trace() / len(M), "frobenius": lambda M: M.norm() / len(M) ** 0.5}
        ratio = 1.0 if pi == "one" else math.sqrt(norm[pi](A) / norm[pi](G))
        eye_a, eye_g = torch.eye(i + 1, dtype=g.dtype), torch.eye(o, dtype=g.dtype)
        block = torch.kron(A + ratio * root * eye_a, G + root / ratio * eye_g)
        W, b = g[offset : offset + o * i].view(o, i), g[offset + o * i : offset + o * (i + 1)]
        U = torch.linalg.solve(block, torch.cat([W, b[:, None]], 1).T.reshape(-1)).view(i + 1, o).T
        expected += [U[:, :i].reshape(-1), U[:, i]]
        offset += o * (i + 1)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-12)


def test_averages_decay_and_periods_are_kept() -> None:
    likelihood = ng.Bernoulli()
    model, y = mlp(4, 3, 3), targets(likelihood)
    pre = exact(model, likelihood, periods=ng.Renewal(inverses=3, early=(1,), statistics=2), decay=0.3)
    A = {k: fisher(model, likelihood, batch(seed=k)).factors["0"].A for k in (1, 2, 4, 6)}
    for k in range(1, 7):
        train_once(model, pre, likelihood, batch(seed=k), y)
    average = 0.3 * A[1] + 0.7 * A[2]  # ε = min(1 − 1/k, 0.3): 0, then 0.3
    average = 0.3 * average + 0.7 * A[4]  # step 3 is not due, nor is 5
    average = 0.3 * average + 0.7 * A[6]
    torch.testing.assert_close(pre._running.factors["0"].A, average, rtol=1e-12, atol=0)
    basis = pre._inverses._kept["0"]
    torch.testing.assert_close(basis.QA @ torch.diag(basis.a) @ basis.QA.T, average, rtol=1e-9, atol=1e-12)
    model.zero_grad()  # the inverses are those of step 6 until step 9
    z = model(batch(seed=7))
    assert not pre.due
    pre.observe(z)
    likelihood.nll(z, y).backward()
    pre.step()
    assert pre._inverses._kept["0"] is basis and pre.stats["steps"] == 7
    plain_periods = exact(model, likelihood, periods=Periods(inverses=2))
    train_once(model, plain_periods, likelihood, batch(), y)
    assert plain_periods.due  # statistics at every step


def test_kl_clip_bounds_the_step() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    U = train_once(model, exact(model, likelihood), likelihood, x, y)
    g = plain(model, likelihood, x, y)
    for radius in (1e-3, 1e3):
        pre = exact(model, likelihood, scaling=ng.KLClip(radius))
        nu = min(1.0, math.sqrt(2 * radius / (g @ U).item()))
        torch.testing.assert_close(train_once(model, pre, likelihood, x, y), nu * U, rtol=1e-10, atol=0)
        assert pre.stats["nu"] == pytest.approx(nu, rel=1e-12)
        step, F = nu * U, fisher(model, likelihood, x).to_dense()
        assert 0.5 * step @ F @ step <= radius
    assert nu == 1.0


def test_sampled_statistics_are_those_of_the_same_draws() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood, expectation="sampled", seed=7)
    generator = torch.Generator().manual_seed(7)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x, expectation="sampled", generator=generator)
    found = train_once(model, pre, likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F.to_dense(), 0.1, g), rtol=1e-9, atol=1e-12)


def test_observe_leaves_loss_gradients_and_global_random_numbers_alone() -> None:
    likelihood = ng.Categorical()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = batch(), targets(likelihood)
    results = []
    for observed in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        pre = ng.Preconditioner(model, likelihood)
        z = model(x)
        if observed:
            pre.observe(z)
            assert all(p.grad is None for p in model.parameters())
        likelihood.nll(z, y).backward()
        results.append((gradient(model), torch.rand(3)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    state = torch.get_rng_state()
    pre.update(x)
    assert torch.equal(state, torch.get_rng_state())


def test_update_equals_observe() -> None:
    likelihood = ng.Categorical()
    results = []
    for eager in (False, True):
        model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
        pre = ng.Preconditioner(model, likelihood, seed=5)
        z = model(x)
        pre.update(x) if eager else pre.observe(z)
        likelihood.nll(z, y).backward()
        pre.step()
        results.append(gradient(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("normalizer", ["example", "element", "none"])
@pytest.mark.parametrize("how", ["observe", "update"])
def test_micro_batches_equal_one_batch(normalizer: str, how: str) -> None:
    likelihood = ng.Bernoulli(normalizer=normalizer)
    results = []
    for sizes in ([12], [5, 4, 3]):
        model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
        pre = exact(model, likelihood)
        for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
            z = model(xs)
            pre.observe(z) if how == "observe" else pre.update(xs)
            (likelihood.nll(z, ys) * (1 if normalizer == "none" else len(xs) / 12)).backward()
        pre.step()
        results.append(gradient(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_outputs_observed_after_all_forward_passes() -> None:
    likelihood = ng.Bernoulli()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model.zero_grad()
    pre = exact(model, likelihood)
    zs = [model(part) for part in x.split(6)]
    for z in reversed(zs):
        pre.observe(z)
    likelihood.nll(torch.cat(zs), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    model.zero_grad()
    pre = exact(model, likelihood)
    z = torch.cat([model(part) for part in x.split(6)])
    pre.observe(z)
    likelihood.nll(z, y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)


def test_targets_and_weights_of_the_loss() -> None:
    likelihood = ng.Categorical(class_weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    z = model(x)
    with pytest.raises(ValueError, match="depends on the targets.*y="):
        pre.observe(z)
    pre.observe(z, y)
    likelihood.nll(z, y).backward()
    pre.step()
    F = fisher(model, likelihood, x, y=y).to_dense()
    torch.testing.assert_close(
        gradient(model), damped_solve(F, 0.1, plain(model, likelihood, x, y)), rtol=1e-9, atol=1e-12
    )
    weight = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gaussian = ng.Gaussian()
    pre, y = exact(model, gaussian), targets(gaussian)
    model.zero_grad()
    z = model(x)
    pre.observe(z, weight=weight)
    loss = gaussian.nll(z, y, weight=weight)
    loss.backward()
    g = gradient(model)
    pre.step()
    F = fisher(model, gaussian, x, weight=weight).to_dense()
    torch.testing.assert_close(gradient(model), damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- traps


class Wrapped(nn.Module):
    """Runs a model in some way."""

    def __init__(self, model: nn.Module, how: Any) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.model, x)


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.SiLU(inplace=True)])
def test_in_place_activations(activation: Any) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3, activation=activation), batch(), targets(likelihood)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    torch.testing.assert_close(F, fisher(reference, likelihood, x).to_dense(), rtol=1e-12, atol=0)
    found = train_once(model, exact(model, likelihood), likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)


def test_checkpointed_models() -> None:
    likelihood = ng.Categorical()
    inner, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    expected = train_once(inner, exact(inner, likelihood), likelihood, x, y)
    inner.zero_grad()
    model = Wrapped(inner, lambda m, x: checkpoint(m, x, use_reentrant=False))
    torch.testing.assert_close(train_once(model, exact(model, likelihood), likelihood, x, y), expected)
    model = Wrapped(inner, lambda m, x: checkpoint(m, x.requires_grad_(), use_reentrant=True))
    pre = exact(model, likelihood)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        pre.observe(model(x.clone()))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        pre.update(x.clone())
    with pytest.raises(RuntimeError, match="no curvature yet"):
        exact(model, likelihood).step()


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(made: str, backend: str) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model.zero_grad()
    pre = exact(model, likelihood) if made == "before" else None
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    pre = pre or exact(compiled, likelihood)
    z = compiled(x)
    with pytest.raises(RuntimeError, match=r"update\(x\)"):
        pre.observe(z)
    pre.update(x)
    likelihood.nll(z, y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    assert set(pre.state_dict()["layers"]) == {"0", "2"}
    torch._dynamo.reset()


def test_part_of_a_model_that_is_compiled_is_not_missed() -> None:
    model = mlp(4, 3, 3)
    model[0].compile(backend="eager")
    pre = exact(model, ng.Categorical())
    with pytest.raises(ValueError, match="layer '0'.*without calling it"):
        pre.observe(model(batch()))
    torch._dynamo.reset()


def test_deepcopied_model_has_a_life_of_its_own() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    twin = copy.deepcopy(model)
    expected = train_once(model, pre, likelihood, x, y)
    with pytest.raises(RuntimeError, match="does not come from"):
        pre.observe(twin(x))
    torch.testing.assert_close(train_once(twin, exact(twin, likelihood), likelihood, x, y), expected)
    torch.optim.swa_utils.AveragedModel(model)(x)
    assert pre._watch._passes == []


def test_inputs_changed_in_place_later() -> None:
    model, x = mlp(4, 3, 3), batch()
    pre = exact(model, ng.Categorical())
    z = model(x)
    x += 1
    with pytest.raises(RuntimeError, match="layer '0' was changed in place"):
        pre.observe(z)
    z = model(x)
    pre.observe(z)
    x += 1  # after the statistics it does no harm


def test_a_failing_forward_pass_leaves_nothing_behind() -> None:
    likelihood = ng.Categorical()

    def fail(model: nn.Module, x: Tensor) -> Tensor:
        z = model(x)
        if x.shape[1] == 4 and x[0, 0] == 99:
            raise RuntimeError("in the middle")
        return z

    model, x, y = Wrapped(mlp(4, 3, 3), fail), batch(), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    pre = exact(model, likelihood)
    bad = x.clone()
    bad[0, 0] = 99
    for call in (lambda: model(bad), lambda: pre.update(bad)):
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
        assert not pre.capture.recording and pre._watch._passes == []
    torch.testing.assert_close(train_once(model, pre, likelihood, x, y), expected)
    layer = model.model[0]
    assert len(layer._forward_hooks) == 1
    del pre
    assert len(layer._forward_hooks) == 0 and len(model._forward_pre_hooks) == 0


def test_frozen_parameters() -> None:
    likelihood = ng.Gaussian()
    model, x, y = mlp(4, 3, 5, 3), batch(), targets(likelihood)
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    pre = exact(model, likelihood)
    found = train_once(model, pre, likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert model[0].weight.grad is None and model[2].weight.grad is None and model[4].bias.grad is None
    model[0].requires_grad_(True)  # not covered: left alone
    model.zero_grad()
    z = model(x)
    pre.observe(z)
    likelihood.nll(z, y).backward()
    before = model[0].weight.grad.clone()
    pre.step()
    assert torch.equal(model[0].weight.grad, before)
    model[2].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="layer '2': requires_grad.*make a new"):
        pre.observe(model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_tied_parameters_are_named_or_left_alone() -> None:
    likelihood = ng.Gaussian()
    torch.manual_seed(0)
    model, x, y = Tied().double(), batch(), targets(likelihood)
    with pytest.raises(ValueError, match=r"a\.weight.*shared"):
        ng.Preconditioner(model, likelihood)
    pre = exact(model, likelihood, uncovered="identity")
    assert "c" in pre.coverage().layers and "a.weight" in str(pre.coverage())
    g = plain(model, likelihood, x, y)
    found = train_once(model, pre, likelihood, x, y)
    size = sum(p.numel() for p in model.c.parameters())
    torch.testing.assert_close(found[:-size], g[:-size])
    A = torch.cat([_inputs_of(model.c, model, x), torch.ones(12, 1, dtype=torch.float64)], 1)
    block = torch.kron(torch.eye(3, dtype=g.dtype), A.T @ A / 12)  # [W b] row by row; G = I
    V = torch.cat([g[-size:-3].view(3, 4), g[-3:, None]], 1).reshape(-1)
    U = damped_solve(block, 0.1, V).view(3, 5)
    torch.testing.assert_close(found[-size:], torch.cat([U[:, :4].reshape(-1), U[:, 4]]), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="identity"):
        ng.Preconditioner(model, likelihood, uncovered="diagonal")


def _inputs_of(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    return seen[0]


def test_layers_that_are_unused_or_used_twice() -> None:
    likelihood = ng.Gaussian()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model, x, y = Twice().double(), batch(d=3), targets(likelihood)
    F = fisher(model, likelihood, x).to_dense()[:12, :12]
    pre = exact(model, likelihood)
    z = model(x)
    pre.observe(z)
    likelihood.nll(z, y).backward()
    g = torch.cat([model.a.weight.grad.reshape(-1), model.a.bias.grad])
    pre.step()
    found = torch.cat([model.a.weight.grad.reshape(-1), model.a.bias.grad])
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert model.idle.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 12])
def test_dtypes_and_a_batch_of_one(dtype: torch.dtype, n: int) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(n), targets(likelihood, n)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model = model.to(dtype)
    pre = exact(model, likelihood)
    found = train_once(model, pre, likelihood, x.to(dtype), y)
    assert found.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert pre.state_dict()["layers"]["0"]["A"].dtype == wide
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_autocast() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3).float(), batch(dtype=torch.float32), targets(likelihood)
    expected = train_once(model, exact(model, likelihood), likelihood, x, y)
    model.zero_grad()
    pre = exact(model, likelihood)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(x)
        assert z.dtype == torch.bfloat16
        loss = likelihood.nll(z.float(), y)
        pre.observe(z)
    loss.backward()
    pre.step()
    assert (gradient(model) - expected).norm() < 0.03 * expected.norm()


def test_nan_batches_are_skipped_and_counted() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    bad = x.clone()
    bad[3, 2] = math.nan
    pre = exact(model, likelihood)
    model.zero_grad()
    pre.observe(model(bad))
    likelihood.nll(model(x), y).backward()
    before = gradient(model)
    pre.step()  # no statistics yet: the gradient is left as it is
    assert torch.equal(gradient(model), before)
    assert pre.stats["skipped"] == 1 and pre.stats["bare"] == 2
    good = train_once(model, pre, likelihood, x, y)
    F, g = fisher(model, likelihood, x).to_dense(), plain(model, likelihood, x, y)
    torch.testing.assert_close(good, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    assert pre.stats["bare"] == 0
    model.zero_grad()
    pre.update(x)
    pre.observe(model(bad))  # one bad micro-batch spoils the estimate of the step, not the average
    likelihood.nll(model(x), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), good, rtol=1e-9, atol=1e-12)
    assert pre.stats["skipped"] == 2 and pre.stats["failed_inverses"] == 0


def test_a_failed_factorisation_keeps_the_previous_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    pre = exact(model, likelihood)
    first = train_once(model, pre, likelihood, x, y)

    def fails(M: Tensor, **settings: Any) -> Any:
        return torch.full_like(M[0], math.nan), torch.full_like(M, math.nan), torch.tensor(False)

    monkeypatch.setattr("natgrad.curvature.inverse.safe_eigh", fails)
    model.zero_grad()
    pre.update(batch(seed=9))
    likelihood.nll(model(x), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), first, rtol=1e-12, atol=0)
    assert pre.stats["failed_inverses"] == 2


def test_batch_norm_and_dropout() -> None:
    likelihood = ng.Categorical()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    x, y = batch(), targets(likelihood)
    with pytest.raises(ValueError, match=r"1\.weight \(BatchNorm1d\)"):
        ng.Preconditioner(model, likelihood)
    pre = exact(model, likelihood, uncovered="identity")
    torch.manual_seed(1)
    F = fisher(model, likelihood, x, uncovered="identity").factors  # with the masks of the same random state
    train_once(model, pre, likelihood, x, y)
    for name in ("0", "4"):
        torch.testing.assert_close(pre._running.factors[name].G, F[name].G, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pre._running.factors[name].A, F[name].A, rtol=1e-9, atol=1e-12)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    pre.update(x)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_sequences_and_forward() -> None:
    likelihood = ng.Categorical()
    model, x = mlp(4, 5, 3), batch(24).view(6, 4, 4)
    y = targets(likelihood, 24).view(6, 4)
    g, F = plain(model, likelihood, x, y), fisher(model, likelihood, x).to_dense()
    found = train_once(model, exact(model, likelihood), likelihood, x, y)
    torch.testing.assert_close(found, damped_solve(F, 0.1, g), rtol=1e-9, atol=1e-12)
    pre = exact(model, likelihood, forward=lambda module, inputs: module(inputs["x"]))
    pre.update({"x": x})
    pre.precondition()
    model.zero_grad()
    likelihood.nll(model(x), y).backward()
    pre.step()
    torch.testing.assert_close(gradient(model), found)


def test_bad_calls_are_explained() -> None:
    likelihood = ng.Categorical()
    model, x, y = mlp(4, 3, 3), batch(), targets(likelihood)
    for settings in ({"structure": "full"}, {"damping": 0.0}, {"damping": -1.0}, {"decay": 1.0}, {"expectation": "no"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ng.Preconditioner(model, likelihood, **settings)
    with pytest.raises(ValueError, match="radius"):
        ng.KLClip(0.0)
    with pytest.raises(ValueError, match="statistics"):
        ng.Renewal(statistics=0)
    with pytest.raises(ValueError, match="no trainable nn.Linear"):
        ng.Preconditioner(nn.Conv1d(1, 1, 1), likelihood, uncovered="identity")
    pre = ng.Preconditioner(model, likelihood)
    with pytest.raises(RuntimeError, match=r"observe\(z\).*update\(inputs\)"):
        pre.step()
    with pytest.raises(TypeError, match="z: expected"):
        pre.observe((model(x),))
    with pytest.raises(ValueError, match="no graph"):
        pre.observe(model(x).detach())
    z = model(x)
    likelihood.nll(z, y).backward()
    with pytest.raises(RuntimeError, match="before loss.backward"):
        pre.observe(z)
    with pytest.raises(ValueError, match="empirical.*y="):
        ng.Preconditioner(model, likelihood, expectation="empirical").observe(model(x))
    with pytest.raises(ValueError, match="empty"):
        pre.update(x[:0])
    with pytest.raises(ValueError, match="targets"):
        pre.observe(model(x), y + 5)


# --------------------------------------------------------------------------------------------------------------- states


def run(model: nn.Module, pre: ng.Preconditioner, steps: range, lr: float = 0.5) -> None:
    likelihood = pre.likelihood
    for k in steps:
        y = targets(likelihood)
        train_once(model, pre, likelihood, batch(seed=k), y)
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad


@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("likelihood", [ng.Categorical(), ng.Bernoulli()], ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("through", ["torch.save", "checkpoint"])
def test_resuming_equals_an_uninterrupted_run(form: Any, likelihood: Any, through: str, tmp_path: Any) -> None:
    settings = {"form": form, "periods": ng.Renewal(inverses=3, statistics=2), "seed": 3}
    model = mlp(4, 3, 3)
    pre = ng.Preconditioner(model, likelihood, **settings)
    run(model, pre, range(1, 5))
    saved = {"model": model.state_dict(), "pre": pre.state_dict()}
    other = mlp(4, 3, 3, seed=9)
    other_pre = ng.Preconditioner(other, likelihood, **{**settings, "seed": 0})
    if through == "torch.save":
        torch.save(saved, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        import torch.distributed.checkpoint as dcp

        dcp.save(saved, checkpoint_id=tmp_path / "state", no_dist=True)
        loaded = {"model": other.state_dict(), "pre": other_pre.state_dict()}
        dcp.load(loaded, checkpoint_id=tmp_path / "state", no_dist=True)
    other.load_state_dict(loaded["model"])
    other_pre.load_state_dict(loaded["pre"])
    run(model, pre, range(5, 12))
    run(other, other_pre, range(5, 12))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert dict(pre.stats) == dict(other_pre.stats)


def test_states_keep_dtypes_and_are_independent() -> None:
    model = mlp(4, 3, 3).float()
    pre = ng.Preconditioner(model, ng.Categorical())
    fresh = pre.state_dict()
    z = model(batch(dtype=torch.float32))
    pre.observe(z)
    z.sum().backward()
    pre.step()
    state = copy.deepcopy(pre.state_dict())
    state["layers"]["0"]["A"] = state["layers"]["0"]["A"].double()
    other = ng.Preconditioner(mlp(4, 3, 3).float(), ng.Categorical())
    other.load_state_dict(state)
    assert other.state_dict()["layers"]["0"]["A"].dtype == torch.float64
    other._running.factors["0"].A.zero_()
    assert state["layers"]["0"]["A"].any()
    pre.load_state_dict(fresh)  # back to the start
    with pytest.raises(RuntimeError, match="no curvature yet"):
        pre.step()


def test_states_that_do_not_fit_change_nothing() -> None:
    likelihood = ng.Categorical()
    model = mlp(4, 3, 3)
    pre = ng.Preconditioner(model, likelihood)
    run(model, pre, range(1, 3))
    before = copy.deepcopy(pre.state_dict())

    def corrupted(change: Any) -> dict[str, Any]:
        state = copy.deepcopy(before)
        state["steps"], state["layers"]["0"]["A"] = 77, state["layers"]["0"]["A"] * 2
        change(state)
        return state

    wider = ng.Preconditioner(mlp(4, 5, 3), likelihood).state_dict()
    exact_form = ng.Preconditioner(model, likelihood, form=ExactTikhonov()).state_dict()
    deeper = ng.Preconditioner(mlp(4, 3, 3, 3), likelihood).state_dict()
    cases = {
        r"layer '0': A: expected a tensor of shape \(5, 5\), got shape \(4, 4\)": corrupted(
            lambda s: s["layers"]["0"].update(A=torch.zeros(4, 4))
        ),
        r"layer '2': inverse_G.*NoneType": corrupted(lambda s: s["layers"]["2"].update(inverse_G=None)),
        r"lacks \['steps'\]": corrupted(lambda s: s.pop("steps")),
        r"has unknown \['more'\]": corrupted(lambda s: s.update(more=1)),
        r"the layers of the model.*lacks \['0'\]": corrupted(lambda s: s["layers"].pop("0")),
        r"state_dict\['steps'\]": corrupted(lambda s: s.update(steps="many")),
        r"generator": corrupted(lambda s: s.update(generator=torch.zeros(3, dtype=torch.uint8))),
        "version 9": corrupted(lambda s: s.update(version=9)),
        "layer '0': G: expected a tensor of shape": wider,
        "form=": exact_form,
        r"has unknown \['4'\]": deeper,
        "expected a mapping": 3,
    }
    for message, state in cases.items():
        with pytest.raises(ValueError, match=message):
            pre.load_state_dict(state)
        now = pre.state_dict()
        assert now["steps"] == 2
        for name, layer in before["layers"].items():
            assert all(torch.equal(value, now["layers"][name][key]) for key, value in layer.items())
