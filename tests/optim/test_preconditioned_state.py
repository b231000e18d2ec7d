"""States of an optimiser with a preconditioner inside: exact continuation, and refusals that change nothing."""

import copy
from typing import Any

import pytest
import torch
from oracles.classifier import LIKELIHOOD, mlp, train
from torch import nn

import natgrad as ng


def make(kind: str, seed: int = 0, **settings: Any) -> tuple[nn.Module, ng.Preconditioned]:
    model = mlp(20, 32, 8, seed=seed)
    parameters: Any = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    inner = (
        torch.optim.SGD(parameters, lr=0.1)
        if kind == "SGD"
        else torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)
    )
    return model, ng.Preconditioned(inner, ng.Preconditioner(model, LIKELIHOOD, **settings))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("through", ["torch.save", "checkpoint"])
def test_resuming_equals_an_uninterrupted_run(kind: str, through: str, tmp_path: Any) -> None:
    model, optimizer = make(kind, periods=ng.Renewal(inverses=5), seed=0)
    train(model, optimizer, optimizer.pre, 1)
    other, resumed = make(kind, seed=3, periods=ng.Renewal(inverses=5))
    if through == "torch.save":
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(loaded["model"])
        resumed.load_state_dict(loaded["optimizer"])
    else:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"m": model_state, "o": optimizer_state}, checkpoint_id=tmp_path / "state", no_dist=True)
        before = nn.utils.parameters_to_vector(other.parameters())
        model_state, optimizer_state = get_state_dict(other, resumed)  # makes a step with every lr 0
        assert torch.equal(before, nn.utils.parameters_to_vector(other.parameters()))
        loaded = {"m": model_state, "o": optimizer_state}
        dcp.load(loaded, checkpoint_id=tmp_path / "state", no_dist=True)
        set_state_dict(other, resumed, model_state_dict=loaded["m"], optim_state_dict=loaded["o"])
    train(model, optimizer, optimizer.pre, 1)
    train(other, resumed, resumed.pre, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert dict(optimizer.pre.stats) == dict(resumed.pre.stats)


def test_states_that_do_not_fit_change_nothing() -> None:
    model, optimizer = make("AdamW")
    train(model, optimizer, optimizer.pre, 1)
    before = copy.deepcopy(optimizer.state_dict())
    other_model, other = make("AdamW", seed=0)
    train(other_model, other, other.pre, 2)

    def corrupted(change: Any) -> dict[str, Any]:
        state = copy.deepcopy(other.state_dict())
        change(state)
        return state

    cases = {
        "holds no preconditioner's state": other.inner.state_dict(),
        "lacks 'param_groups'": {"state": {}},
        r"its groups hold \[2, 2\]": corrupted(lambda s: s["param_groups"].pop()) | {},
        r"layer '2': the state lacks \['A'\]": corrupted(lambda s: s["state"][2].pop("natgrad.A")),
        r"layer '0': G: expected": corrupted(lambda s: s["state"][0].update({"natgrad.G": torch.zeros(3)})),
    }
    cases[r"groups hold \[2\] parameters, those of the optimiser \[2, 2\]"] = cases.pop(r"its groups hold \[2, 2\]")
    for message, state in cases.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        now = optimizer.state_dict()
        for i, saved in before["state"].items():
            assert all(torch.equal(value, now["state"][i][key]) for key, value in saved.items())
        assert now["param_groups"] == before["param_groups"]


def test_saving_leaves_the_inner_state_alone_and_saves_anew() -> None:
    model, optimizer = make("AdamW")
    keys = {"step", "exp_avg", "exp_avg_sq"}
    for steps in (12, 24):
        train(model, optimizer, optimizer.pre, 1)
        saved = optimizer.state_dict()
        assert {int(state["natgrad.steps"]) for state in saved["state"].values()} == {steps}
        assert all(set(state) == keys for state in optimizer.inner.state.values())
