"""K-FAC in every situation that is known to fool hooks or automatic differentiation: the update of the plain model."""

import copy
import gc
from typing import Any

import pytest
import torch
from oracles.kfac import mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad as ng

LIKELIHOOD = ng.Categorical()


def data(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def steps(model: nn.Module, opt: ng.KFAC, count: int = 3, n: int = 12) -> Tensor:
    """The parameters after some updates."""
    x, y = data(n, next(model.parameters()).dtype)
    for _ in range(count):
        loss = opt.step(x, y)
        assert torch.isfinite(loss)
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def reference(activation: Any = nn.Tanh, **settings: Any) -> Tensor:
    model = mlp(4, 5, 3, activation=activation)
    return steps(model, ng.KFAC(model, LIKELIHOOD, damping=0.3, **settings))


def check(model: nn.Module, opt: ng.KFAC, expected: Tensor) -> None:
    torch.testing.assert_close(steps(model, opt), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("made", ["before", "after", "of the compiled"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(made: str, backend: str) -> None:
    model = mlp(4, 5, 3)
    x, _ = data()
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3) if made == "before" else None
    compiled = torch.compile(model, backend=backend)
    plain = compiled(x)
    if opt is None:
        opt = ng.KFAC(compiled if made == "of the compiled" else model, LIKELIHOOD, damping=0.3)
    torch.testing.assert_close(compiled(x), plain)
    check(model, opt, reference())
    torch.testing.assert_close(compiled(x), model(x))  # compiled code sees the new parameters
    assert set(opt._running.factors) == {"0", "2"}
    torch._dynamo.reset()


def test_model_compiled_in_place() -> None:
    model = mlp(4, 5, 3)
    model.compile(backend="eager")
    model(data()[0])
    check(model, ng.KFAC(model, LIKELIHOOD, damping=0.3), reference())
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_() if self.reentrant else x, use_reentrant=self.reentrant)


def test_checkpointed_models() -> None:
    model = Checkpointed(mlp(4, 5, 3), reentrant=False)
    check(model, ng.KFAC(model, LIKELIHOOD, damping=0.3), reference())


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = Checkpointed(mlp(4, 5, 3), reentrant=True)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        opt.step(*data())
    assert torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.ELU])
def test_in_place_activations(activation: Any) -> None:
    model = mlp(4, 5, 3, activation=lambda: activation(inplace=True))
    check(model, ng.KFAC(model, LIKELIHOOD, damping=0.3), reference(activation))


def test_deepcopied_model_has_a_life_of_its_own() -> None:
    model = mlp(4, 5, 3)
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    twin = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    check(model, opt, reference())
    x, _ = data()
    with opt.capture.record() as record:
        twin(x)
        average(x)
    assert record.inputs == {}
    check(twin, ng.KFAC(twin, LIKELIHOOD, damping=0.3), reference())
    average.update_parameters(model)
    torch.testing.assert_close(average(x), model(x))


class Failing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.error = inner, None

    def forward(self, x: Tensor) -> Tensor:
        s = self.inner(x)
        if self.error is not None:
            raise self.error("in the middle")
        return s


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exceptions_leave_nothing_behind(error: type[BaseException]) -> None:
    model = Failing(mlp(4, 5, 3))
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    rng, flash = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    model.error = error
    with pytest.raises(error, match="in the middle"):
        opt.step(*data())
    assert not opt.capture.recording and all(p.grad is None for p in model.parameters())
    assert torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(rng, torch.get_rng_state()) and flash == torch.backends.mha.get_fastpath_enabled()
    model.error = None
    layer = model.inner[0]
    assert len(layer._forward_hooks) == 1
    assert steps(model, opt).isfinite().all()
    del opt
    gc.collect()
    assert len(layer._forward_hooks) == 0


def test_a_refused_batch_changes_nothing_that_follows() -> None:
    model = mlp(4, 5, 3)
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    x, y = data()
    for bad in ((x[:, :3], y), (x, y[:5]), (x[:0], y[:0])):
        with pytest.raises((ValueError, RuntimeError)):
            opt.step(*bad)
        assert not opt.capture.recording
    assert steps(model, opt).isfinite().all()


def test_frozen_parameters() -> None:
    """The update is that of a model in which what is frozen is a constant."""

    class Constant(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = (nn.Buffer(p.detach().clone()) for p in (layer.weight, layer.bias))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    first, second = mlp(4, 5, 5, 3), mlp(4, 5, 5, 3)
    first[2].requires_grad_(False)
    second[2] = Constant(second[2])
    opt = ng.KFAC(first, LIKELIHOOD, damping=0.3)
    expected = steps(second, ng.KFAC(second, LIKELIHOOD, damping=0.3))
    before = first[2].weight.clone()
    steps(first, opt)
    found = nn.utils.parameters_to_vector([p for p in first.parameters() if p.requires_grad])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(before, first[2].weight) and first[2].weight.grad is None


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_half_frozen_layers_move_by_what_is_left(part: str) -> None:
    model = mlp(4, 5, 3)
    getattr(model[0], part).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    x, y = data()
    first = opt.step(x, y).item()
    assert opt.step(x, y).item() < first
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == f"0.{part}")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_tied_parameters() -> None:
    model = Tied().double()
    with pytest.raises(ValueError, match=r"a\.weight.*shared"):
        ng.KFAC(model, LIKELIHOOD, structure="block_tridiagonal")
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    x, y = data()
    losses = [opt.step(x, y).item() for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0] and model.b.weight is model.a.weight
    assert sum(len(group["params"]) for group in opt.param_groups) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 12])
def test_precision_is_kept_and_a_batch_of_one_works(dtype: torch.dtype, n: int) -> None:
    model = mlp(4, 5, 3)
    expected = steps(model, ng.KFAC(model, LIKELIHOOD, damping=0.3), count=1, n=n)
    model = mlp(4, 5, 3).to(dtype)
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    found = steps(model, opt, count=1, n=n)
    assert found.dtype == dtype and opt._running.factors["0"].A.dtype == dtype
    if dtype == torch.float64:
        assert torch.equal(found, expected)
    x, y = data(n, dtype)
    assert torch.isfinite(opt.step(x, y)) and opt.stats["skipped"] == 0


def test_inputs_changed_in_place_between_updates_do_no_harm() -> None:
    """A data loader that reuses its buffers: nothing may be kept that still points at them."""
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    results = []
    for reuse in (False, True):
        model = mlp(4, 5, 3)
        opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
        _, y = data()
        buffer = torch.empty(12, 4, dtype=torch.float64)
        for x in batches:
            opt.step(buffer.copy_(x) if reuse else x, y)
        results.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*results)


def test_inputs_changed_in_place_by_the_model_are_named() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            s = self.inner[0](x)
            x.mul_(0)
            return self.inner[2](torch.tanh(s))

    model = Careless()
    model.inner[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="in.?place"):
        ng.KFAC(model, LIKELIHOOD, damping=0.3).step(*data())


def test_gradients_mode_and_the_users_state_are_left_alone() -> None:
    model = mlp(4, 5, 3)
    opt = ng.KFAC(model, LIKELIHOOD, damping=0.3)
    LIKELIHOOD.nll(model(data()[0]), data()[1]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(11)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with torch.no_grad():
        opt.step(*data())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.get_default_dtype() == dtype
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
