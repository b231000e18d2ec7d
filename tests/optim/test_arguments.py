"""Arguments of the wrong kind are refused when an optimiser is made, by name; so are models changed behind its back."""

import warnings
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, exact, gradient, mlp, targets, train_once
from torch import nn

import natgrad as ng
from natgrad.layers.coverage import cover
from natgrad.model_view import ModelView
from natgrad.optim.arguments import warn_of_size

LIKELIHOOD = ng.Categorical()
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "form": (ng.Preconditioner, {"form": "exact"}, r"form='exact': expected an object such as natgrad\.ExactTikhonov"),
    "periods": (ng.Preconditioner, {"periods": 3}, r"periods=3: expected an object such as natgrad\.Periods"),
    "scaling": (ng.Preconditioner, {"scaling": 0.1}, r"scaling=0\.1: expected natgrad\.KLClip\(\)"),
    "seed": (ng.Preconditioner, {"seed": 1.5}, r"seed=1\.5: expected a whole number"),
    "kfac's seed": (ng.KFAC, {"seed": "a"}, "seed='a': expected a whole number"),
    "kfac's periods": (ng.KFAC, {"periods": 3}, r"periods=3: expected an object such as natgrad\.Periods"),
    "subsets": (ng.KFAC, {"subsets": 0.5}, r"subsets=0\.5: expected an object such as natgrad\.Subsets"),
    "guard": (ng.KFAC, {"guard": True}, r"guard=True: expected an object such as natgrad\.StepGuard\(\) or None"),
    "rescaling": (ng.KFAC, {"rescaling": 1}, r"rescaling=1: expected an object such as natgrad\.Rescaling"),
    "damping": (ng.KFAC, {"damping": "x"}, r"damping='x': expected a number, a natgrad\.Damping, or None"),
    "l2": (ng.KFAC, {"l2": "x"}, "l2='x': expected a number"),
    "lr": (ng.KFAC, {"lr": None}, "lr=None: expected a number; 1 takes the computed step"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_of_the_wrong_kind(name: str) -> None:
    make, settings, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        make(mlp(4, 3), LIKELIHOOD, **settings)


def test_settings_that_are_objects_check_their_own() -> None:
    with pytest.raises(TypeError, match=r"Renewal\(inverses=1\.5.*expected whole numbers of updates"):
        ng.Renewal(inverses=1.5)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match=r"early=3.*early being several, such as \(1, 2, 3\)"):
        ng.Periods(early=3)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match=r"early=\(0, 1\).*expected.*early >= 1"):
        ng.Periods(early=(0, 1))
    with pytest.raises(TypeError, match=r"KLClip\(radius='a'\): expected a number"):
        ng.KLClip("a")  # pyrefly: ignore[bad-argument-type]
    assert ng.Periods(early=()).due(10)


def test_complex_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64))
    for make in (ng.Preconditioner, ng.KFAC):
        with pytest.raises(ValueError, match=r"model: 0\.weight is complex; expected real parameters"):
            make(model, ng.Gaussian())


@pytest.mark.parametrize("update", [False, True])
def test_a_model_in_another_precision_than_at_construction(update: bool) -> None:
    model, x, y = mlp(4, 3).float(), batch().float(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD)
    train_once(model, pre, LIKELIHOOD, x, y)
    model.double()
    with pytest.raises(ValueError, match=r"0\.weight: when .* torch\.float32 on cpu, now they would be torch\.float64"):
        pre.update(x.double()) if update else pre.observe(model(x.double()))
    model.float()
    train_once(model, pre, LIKELIHOOD, x, y)
    model.bfloat16()  # its statistics are single precision as before
    train_once(model, pre, LIKELIHOOD, x.bfloat16(), y)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_a_part_that_is_compiled(made: str, how: str) -> None:
    """Layers inside a compiled part are those they were; what is observed says which call to use instead."""
    x, y, found = batch(), targets(LIKELIHOOD), []
    for compiled in (False, True):
        model = mlp(4, 5, 3)
        pre = exact(model, LIKELIHOOD) if made == "before" else None
        if compiled and how == "wrapped":
            model[0] = torch.compile(model[0], backend="eager")  # pyrefly: ignore[unsupported-operation]
        elif compiled:
            model[0].compile(backend="eager")
        pre = pre or exact(model, LIKELIHOOD)
        for _ in range(2):
            model.zero_grad()
            pre.update(x)
            LIKELIHOOD.nll(model(x), y).backward()
            pre.step()
        found.append(gradient(model))
        if compiled:
            with pytest.raises(ValueError, match=r"layer '0'.*a part that is compiled.*call update\(x\)"):
                exact(model, LIKELIHOOD).observe(model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(*found)


def test_a_factor_too_wide_to_be_inverted_is_told() -> None:
    with torch.device("meta"):
        wide = nn.Sequential(nn.Embedding(20_000, 8), nn.Linear(8, 20_000))
    with pytest.warns(UserWarning, match=r"layer '1' has a factor of 20000 x 20000 numbers, 1\.6 GB.*exclude=\['1'\]"):
        warn_of_size(cover(ModelView(wide)).blocks, "block_diagonal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_size(cover(ModelView(wide), exclude=["1"]).blocks, "block_diagonal")  # an embedding's A is a diagonal
        warn_of_size(cover(ModelView(wide)).blocks, "input_covariance")


def test_an_optimiser_is_preconditioned_once() -> None:
    model = mlp(4, 3)
    pre = exact(model, LIKELIHOOD)
    once = ng.Preconditioned(torch.optim.SGD(model.parameters(), 0.1), pre)
    with pytest.raises(TypeError, match="inner_optimizer: got a Preconditioned"):
        ng.Preconditioned(once, pre)
