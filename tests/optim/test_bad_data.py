"""What K-FAC and the preconditioner say about data, models and settings that do not fit: the thing, and what to try."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.kfac import data, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.optim.settings import Damping, Periods, StepGuard

LIKELIHOODS = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "categorical": ng.Categorical()}


def batch(name: str) -> tuple[Tensor, Tensor]:
    return data(LIKELIHOODS[name], 4, 3)


BATCHES: dict[str, tuple[str, Callable[[Tensor, Tensor], Any], str]] = {
    "inputs of another dtype": ("gaussian", lambda x, y: (x.float(), y), r"inputs: .*float32.*\.to\(torch.float64\)"),
    "inputs elsewhere": ("gaussian", lambda x, y: (x.to("meta"), y), "inputs: .*on meta, the model on cpu; move one"),
    "targets elsewhere": ("gaussian", lambda x, y: (x, y.to("meta")), "targets: on meta, .* on cpu; move one"),
    "targets of another width": (
        "gaussian",
        lambda x, y: (x, y[:, :2]),
        r"targets: expected shape \(12, 3\).*12, 2",
    ),
    "fewer targets": ("categorical", lambda x, y: (x, y[:5]), "targets: 5 examples for 12 inputs; expected one"),
    "no examples": ("bernoulli", lambda x, y: (x[:0], y[:0]), "inputs: the batch is empty.*at least one example"),
    "targets above 1": ("bernoulli", lambda x, y: (x, y + 3), r"targets: Bernoulli expects values in \[0, 1\].*scale"),
    "negative targets": ("bernoulli", lambda x, y: (x, y - 3), r"targets: Bernoulli expects values in \[0, 1\]"),
    "a class too many": (
        "categorical",
        lambda x, y: (x, y + 1),
        "targets: found class 3; expected .* from 0 to 2",
    ),
    "a negative class": ("categorical", lambda x, y: (x, y - 1), "targets: found class -1"),
    "real classes": ("categorical", lambda x, y: (x, y.double()), r"targets: .*integer classes.*y\.long\(\)"),
    "an empty micro-batch": ("gaussian", lambda x, y: ([(x, y), (x[:0], y[:0])],), "inputs: the batch is empty"),
    "no micro-batch": ("gaussian", lambda x, y: ([],), "inputs: the batch is empty; expected at least one"),
    "micro-batches without targets": ("gaussian", lambda x, y: ([x, x],), r"each element must be a pair"),
    "inputs that are no tensors": ("gaussian", lambda x, y: ("pictures", y), "inputs: expected a tensor.*got str"),
    "targets that are no tensors": ("gaussian", lambda x, y: (x, "labels"), "targets: .*str"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_kfac_refuses_batches_by_name_and_goes_on(kind: str) -> None:
    name, spoil, message = BATCHES[kind]
    model, (x, y) = mlp(4, 5, 3), batch(name)
    opt = ng.KFAC(model, LIKELIHOODS[name], damping=0.3)
    before = vector(model)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.step(*spoil(x, y))
    assert torch.equal(before, vector(model)) and not opt.capture.recording
    assert opt.step(x, y) > LIKELIHOODS[name].nll(model(x), y) and opt.stats["skipped"] == 0


PASSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Any], str]] = {
    "inputs of another dtype": ("gaussian", lambda x, y: (x.float(),), r"inputs: .*float32.*\.to\(torch.float64\)"),
    "inputs elsewhere": ("gaussian", lambda x, y: (x.to("meta"),), "inputs: .*on meta, the model on cpu; move one"),
    "no examples": ("bernoulli", lambda x, y: (x[:0],), "inputs: the batch is empty.*at least one example"),
    "targets of another width": ("gaussian", lambda x, y: (x, y[:, :2]), r"targets: expected shape \(12, 3\)"),
    "targets elsewhere": ("gaussian", lambda x, y: (x, y.to("meta")), "targets: on meta, .* on cpu; move one"),
    "a class too many": (
        "categorical",
        lambda x, y: (x, y + 1),
        "targets: found class 3; expected .* from 0 to 2",
    ),
}


@pytest.mark.parametrize("kind", PASSES)
def test_the_preconditioner_refuses_batches_by_name_and_goes_on(kind: str) -> None:
    name, spoil, message = PASSES[kind]
    model, (x, y) = mlp(4, 5, 3), batch(name)
    pre = ng.Preconditioner(model, LIKELIHOODS[name], expectation="empirical")
    if len(spoil(x, y)) == 1:
        pre = ng.Preconditioner(model, LIKELIHOODS[name])
    with pytest.raises(ValueError, match=message):
        pre.update(*spoil(x, y))
    pre.update(x, y)
    LIKELIHOODS[name].nll(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    pre.step()
    for p, gradient in zip(model.parameters(), plain, strict=True):
        assert torch.isfinite(p.grad).all() and not torch.equal(p.grad, gradient)


OPTIMISERS = {"KFAC": ng.KFAC, "Preconditioner": ng.Preconditioner}
by_optimiser = pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)


@by_optimiser
def test_models_that_cannot_be_trained_or_covered(make: Any) -> None:
    for model in (nn.Tanh(), mlp(4, 3).requires_grad_(False)):
        with pytest.raises(ValueError, match="model: .* has no trainable parameters; expected .*requires_grad=True"):
            make(model, ng.Gaussian())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        make("mlp", ng.Gaussian())
    prelu = nn.Sequential(nn.PReLU(), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight \(PReLU\).*freeze them.*uncovered='identity' or uncovered='diag"):
        make(prelu, ng.Gaussian())


@by_optimiser
@pytest.mark.parametrize("likelihood", [nn.MSELoss(), None, ng.Gaussian], ids=["loss", "none", "class"])
def test_likelihoods_that_are_none(make: Any, likelihood: Any) -> None:
    with pytest.raises(TypeError, match="likelihood: expected an object like"):
        make(mlp(4, 3), likelihood)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"damping": -1.0}, "damping=-1.0"),
        (lambda: {"damping": math.nan}, "damping=nan"),
        (lambda: {"damping": Damping(ratio=0.0)}, "ratio=0.0"),
        (lambda: {"l2": math.nan}, "l2=nan"),
        (lambda: {"damping": math.inf}, "damping=inf"),
        (lambda: {"l2": math.inf}, "l2=inf"),
        (lambda: {"lr": -1.0}, "lr=-1.0"),
        (lambda: {"periods": Periods(inverses=0)}, "inverses=0"),
        (lambda: {"guard": StepGuard(raise_damping=0.0)}, "raise_damping=0.0"),
        (lambda: {"guard": StepGuard(threshold=math.nan)}, "threshold=nan"),
    ],
)
def test_settings_out_of_range(make: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ng.KFAC(mlp(4, 3), ng.Gaussian(), **make())
