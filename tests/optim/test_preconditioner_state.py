"""States of a preconditioner: exact continuation, and refusals that change nothing."""

import copy
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, mlp, targets, train_once
from torch import nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov


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
