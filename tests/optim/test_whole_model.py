"""The conventions of optimisers that evaluate the model themselves: learning rates, checkpoints, bad batches."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import networks
from oracles.kfac import data, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.optim.whole_model import WholeModelOptimizer

MAKERS: dict[str, Callable[..., WholeModelOptimizer]] = {
    "HessianFree": lambda model, likelihood, **settings: ng.HessianFree(model, likelihood, share=0.5, **settings),
    "KrylovDescent": ng.KrylovDescent,
    "NaturalGradient": lambda model, likelihood, **settings: ng.NaturalGradient(
        model, likelihood, preconditioner=ng.KroneckerPreconditioner(rows=8), **settings
    ),
    "TONGA": lambda model, likelihood, **settings: ng.TONGA(
        model, likelihood, damping=1.0, momentum=0.5, gradients=8, **settings
    ),
    "TONGA with a past": lambda model, likelihood, **settings: ng.TONGA(
        model, likelihood, damping=1.0, past=ng.PastGradients(rank=5), **settings
    ),
}
by_optimiser = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
LIKELIHOOD = ng.Bernoulli()


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model, and four batches of twelve examples."""
    batches = [data(LIKELIHOOD, 4, 3, seed=seed) for seed in range(1, 5)]
    return mlp(4, 5, 3).to(dtype), [(x.to(dtype), y.to(dtype)) for x, y in batches]


@by_optimiser
def test_every_step_returns_the_loss_before_it_and_lowers_it_in_the_end(make: Any) -> None:
    model, batches = problem()
    opt = make(model, LIKELIHOOD, lr=0.3)
    x, y = batches[0]
    for _ in range(15):
        before = LIKELIHOOD.nll(model(x), y).detach()
        found = opt.step(x, y)
        torch.testing.assert_close(found, before)
        assert found.shape == () and not found.requires_grad and found.dtype == torch.float64
    first = LIKELIHOOD.nll(problem()[0](x), y)
    assert LIKELIHOOD.nll(model(x), y) < first - 0.02
    assert opt.stats["updates"] == 15 and opt.stats["skipped"] == 0
    assert math.isfinite(opt.stats["loss"]) and opt.stats["step_norm"] >= 0


@by_optimiser
def test_the_learning_rate_of_the_group_multiplies_the_step(make: Any) -> None:
    steps = []
    for lr in (1.0, 0.25):
        model, batches = problem()
        opt = make(model, LIKELIHOOD, lr=1.0)
        torch.optim.lr_scheduler.LambdaLR(opt, lambda _, lr=lr: lr)
        before = vector(model)
        opt.step(*batches[0])
        steps.append(vector(model) - before)
    torch.testing.assert_close(steps[1], 0.25 * steps[0])


@by_optimiser
@pytest.mark.parametrize("way", ["copy", "file"])
def test_resuming_equals_an_uninterrupted_run(make: Any, way: str) -> None:
    model, batches = problem(torch.float32)
    opt = make(model, LIKELIHOOD, lr=0.3, seed=5)
    for x, y in batches[:2]:
        opt.step(x, y)
    saved: Any = {"model": copy.deepcopy(model.state_dict()), "opt": copy.deepcopy(opt.state_dict())}
    if way == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    expected = [opt.step(x, y).item() for x, y in batches[2:]]
    other = mlp(4, 5, 3, seed=9).float()
    again = make(other, LIKELIHOOD, lr=1.0, seed=0)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert again.param_groups[0]["lr"] == 0.3
    assert [again.step(x, y).item() for x, y in batches[2:]] == expected
    assert torch.equal(vector(other), vector(model)) and again.stats["updates"] == 4


@by_optimiser
def test_a_schedule_may_be_made_anew_after_a_state_is_loaded(make: Any) -> None:
    """``initial_lr``, which a scheduler writes into the groups and asks for when it is made at a later epoch."""
    model, batches = problem()
    opt = make(model, LIKELIHOOD, lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for x, y in batches[:2]:
        opt.step(x, y)
        schedule.step()
    again = make(mlp(4, 5, 3), LIKELIHOOD, lr=1.0)
    again.load_state_dict(opt.state_dict())
    assert again.state_dict()["param_groups"][0].keys() == opt.state_dict()["param_groups"][0].keys()
    schedule = torch.optim.lr_scheduler.ExponentialLR(again, 0.5, last_epoch=1)
    assert again.param_groups[0]["initial_lr"] == 0.5 and schedule.get_last_lr() == [0.125]
    assert set(again.param_groups[0]) == {"params", "param_names", "lr", "initial_lr"}


def test_a_state_with_more_in_it_is_refused() -> None:
    """A past of more directions once lost the largest of them, momentum was lost altogether."""
    model, batches = problem()
    opt = ng.TONGA(model, LIKELIHOOD, past=ng.PastGradients(rank=5))
    opt.step(*batches[0])
    for past, momentum in ((ng.PastGradients(rank=3), 0.9), (None, 0.9), (None, 0.0)):
        other = ng.TONGA(model, LIKELIHOOD, past=past, momentum=momentum)
        with pytest.raises(ValueError, match=r"parameter '0.weight': the state has unknown .*'past_4'"):
            other.load_state_dict(opt.state_dict())


@by_optimiser
def test_numbers_of_a_step_stay_as_they_were(make: Any) -> None:
    model, batches = problem()
    opt = make(model, LIKELIHOOD)
    opt.step(*batches[0])
    stats = opt.stats
    opt.step(batches[1][0] * math.nan, batches[1][1])
    assert stats["skipped"] == 0 and opt.stats["skipped"] == 1


@by_optimiser
def test_a_copy_is_refused(make: Any) -> None:
    opt = make(problem()[0], LIKELIHOOD)
    with pytest.raises(TypeError, match=f"{type(opt).__name__} belongs to the model that it evaluates"):
        copy.deepcopy(opt)


class _SparseEmbedding(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))


@by_optimiser
def test_sparse_gradients_are_refused_by_name(make: Any) -> None:
    with pytest.raises(ValueError, match="model: Embedding '0' has sparse gradients.*sparse=False"):
        make(_SparseEmbedding(), LIKELIHOOD)
    with pytest.raises(ValueError, match="Embedding '0' has sparse gradients"):
        ng.Fisher(_SparseEmbedding(), LIKELIHOOD, torch.zeros(3, 2, dtype=torch.long))


@by_optimiser
def test_what_was_frozen_in_the_meantime_is_named(make: Any) -> None:
    model, batches = problem()
    opt = make(model, LIKELIHOOD)
    before = copy.deepcopy(model.state_dict())
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2\.weight was frozen"):
        opt.step(*batches[0])
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


@pytest.mark.parametrize(
    "make, message",
    {
        "lr": (lambda m: ng.HessianFree(m, LIKELIHOOD, lr="fast"), "lr='fast': expected a number"),  # type: ignore
        "solve": (lambda m: ng.HessianFree(m, LIKELIHOOD, solve=30), "solve=30: expected natgrad.InnerSolve"),
        "damping": (lambda m: ng.HessianFree(m, LIKELIHOOD, damping="a"), "damping='a': expected a number"),
        "line search": (lambda m: ng.HessianFree(m, LIKELIHOOD, search=True), "search=True: expected natgrad.Line"),
        "search": (lambda m: ng.KrylovDescent(m, LIKELIHOOD, search=None), "search=None: expected natgrad.Subspace"),
        "share": (lambda m: ng.KrylovDescent(m, LIKELIHOOD, share="all"), "share='all': expected a number"),
        "size": (lambda m: ng.SubspaceSearch(size=2.5), "size=2.5: expected a whole number"),
        "past": (lambda m: ng.TONGA(m, LIKELIHOOD, past=5), "past=5: expected natgrad.PastGradients"),
        "gradients": (lambda m: ng.TONGA(m, LIKELIHOOD, gradients=2.5), "gradients=2.5: expected a whole number"),
        "size of micro-batches": (
            lambda m: ng.TONGA(m, LIKELIHOOD).step(*problem()[1][0], 2.5),
            "micro_batch_size=2.5: expected a whole number",
        ),
    }.values(),
)
def test_settings_of_another_kind_are_named(make: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(problem()[0])


@by_optimiser
def test_states_that_do_not_fit_change_nothing(make: Any) -> None:
    model, batches = problem()
    opt = make(model, LIKELIHOOD)
    opt.step(*batches[0])
    before = copy.deepcopy(opt.state_dict())
    wider = make(mlp(4, 6, 6, 3), LIKELIHOOD)
    foreign = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    broken = copy.deepcopy(before)
    broken["param_groups"][0]["update"] = "many"
    cases = [
        (wider.state_dict(), "parameter groups of .6. parameters; this model has one of 4"),
        (foreign, "lacks"),
        ("state", "expected what"),
        (broken, "update is 'many'"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    after = opt.state_dict()
    assert after["param_groups"][0]["update"] == before["param_groups"][0]["update"] == 1
    for index, saved in before["state"].items():
        for key, value in saved.items():
            assert torch.equal(after["state"][index][key], value)


class _Counting(nn.Module):
    """A buffer that every forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += x.sum()
        return self.layer(x)


@by_optimiser
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(make: Any, bad: float) -> None:
    torch.manual_seed(0)
    model = _Counting().double()
    _, batches = problem()
    opt, twin_model = make(model, LIKELIHOOD, lr=0.3), copy.deepcopy(model)
    twin = make(twin_model, LIKELIHOOD, lr=0.3)
    x, y = batches[0]
    opt.step(x, y)
    twin.step(x, y)
    spoilt = x.clone()
    spoilt[3, 2] = bad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = opt.step(spoilt, y)
    assert not math.isfinite(loss) and opt.stats["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    opt._generator.set_state(twin._generator.get_state())
    opt.step(*batches[1])
    twin.step(*batches[1])
    assert torch.equal(vector(model), vector(twin_model))


@by_optimiser
def test_what_is_no_batch_is_refused_by_name(make: Any) -> None:
    model, batches = problem()
    x, y = batches[0]
    opt = make(model, LIKELIHOOD)
    before, name = vector(model), type(opt).__name__
    with pytest.raises(TypeError, match=rf"{name}.step\(inputs, targets\).*takes no closure.*Preconditioner"):
        opt.step(lambda: 0.0)
    with pytest.raises(TypeError, match="inputs are missing"):
        opt.step()
    with pytest.raises(ValueError, match="5 examples for 12 inputs"):
        opt.step(x, y[:5])
    with pytest.raises(ValueError, match="the batch is empty"):
        opt.step(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"targets: Bernoulli expects values in \[0, 1\]"):
        opt.step(x, y + 3)
    with pytest.raises(ValueError, match="targets: expected shape"):
        opt.step(x, y[:, :2])
    with pytest.raises(ValueError, match="float32"):
        opt.step(x.float(), y)
    assert torch.equal(vector(model), before)
    opt.param_groups[0]["lr"] = 0.0
    assert opt.step() is None
    opt.param_groups[0]["lr"] = 1.0
    opt.step(x, y)
    assert not torch.equal(vector(model), before)


@by_optimiser
def test_models_and_likelihoods_that_are_none(make: Any) -> None:
    with pytest.raises(TypeError, match="likelihood: expected an object like"):
        make(mlp(4, 3), nn.MSELoss())
    with pytest.raises(ValueError, match="has no trainable parameters"):
        make(mlp(4, 3).requires_grad_(False), LIKELIHOOD)
    for lr in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr="):
            make(mlp(4, 3), LIKELIHOOD, lr=lr)


@by_optimiser
def test_the_global_random_stream_and_gradients_are_left_alone(make: Any) -> None:
    model, batches = problem()
    state = torch.get_rng_state()
    make(model, LIKELIHOOD).step(*batches[0])
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@by_optimiser
def test_dropout_and_frozen_parameters(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3), nn.LayerNorm(3)).double()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    _, batches = problem()
    opt = make(model, LIKELIHOOD, lr=0.1)
    for x, y in batches:
        assert math.isfinite(opt.step(x, y))
    assert opt.stats["skipped"] == 0 and torch.equal(model[0].weight, frozen)


@by_optimiser
def test_a_parameter_without_dimensions(make: Any) -> None:
    case = networks.case("scalar")
    x, y = torch.cat([case.x] * 3), torch.ones(12, 2, dtype=torch.float64)
    opt = make(case.model, LIKELIHOOD)
    before, first = case.model.scale.item(), opt.step(x, y)
    assert opt.step(x, y) < first and case.model.scale.item() > before
    opt.load_state_dict(opt.state_dict())


@by_optimiser
def test_a_second_group_is_refused(make: Any) -> None:
    model, batches = problem()
    opt = make(model, LIKELIHOOD)
    for parameters in ([nn.Parameter(torch.zeros(3))], [("head", nn.Parameter(torch.zeros(3)))]):
        with pytest.raises(
            ValueError, match=f"add_param_group: {type(opt).__name__} trains the parameters that its mo"
        ):
            opt.add_param_group({"params": parameters})
    assert len(opt.param_groups) == 1
    opt.step(*batches[0])
