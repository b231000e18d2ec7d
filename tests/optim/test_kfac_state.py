"""K-FAC continues from a checkpoint as if nothing had happened, and refuses one that does not fit."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.optim.settings import Damping, Periods

FORMS = [ExactTikhonov(), FactoredTikhonov()]


class _Scaled(nn.Module):
    """A covered layer and a parameter that no factor covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale)


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return _Scaled().to(dtype)


def _batch(k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(16, 5, generator=generator, dtype=dtype), torch.rand(16, 3, generator=generator, dtype=dtype)


def _optimizer(model: nn.Module, form: Any = FORMS[1], **settings: Any) -> ng.KFAC:
    settings = {"damping": Damping(form=form), "uncovered": "diagonal", "periods": Periods(4, (1, 2)), **settings}
    return ng.KFAC(model, ng.Bernoulli(normalizer="element"), l2=1e-3, seed=3, **settings)


def _train(model: nn.Module, opt: ng.KFAC, first: int, last: int) -> list[float]:
    return [opt.step(*_batch(k)).item() for k in range(first, last)]


def _through(way: str, state: dict[str, Any]) -> dict[str, Any]:
    if way == "copy":
        return copy.deepcopy(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("way", ["copy", "file"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_resuming_equals_an_uninterrupted_run(form: Any, way: str) -> None:
    model = _model()
    opt = _optimizer(model, form)
    _train(model, opt, 0, 6)
    weights, state = copy.deepcopy(model.state_dict()), _through(way, opt.state_dict())
    losses = _train(model, opt, 6, 14)
    again = _model()
    again.load_state_dict(weights)
    resumed = _optimizer(again, form)
    resumed.load_state_dict(state)
    assert _train(again, resumed, 6, 14) == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert dict(resumed.stats) == dict(opt.stats)


def test_resuming_with_the_gamma_rule_and_an_lr_schedule() -> None:
    def make(model: nn.Module) -> tuple[ng.KFAC, torch.optim.lr_scheduler.StepLR]:
        damping = Damping(10.0, FactoredTikhonov(), gamma=ng.GreedyGamma(every=4))
        settings = {"uncovered": "identity", "periods": Periods(2), "damping": damping}
        opt = ng.KFAC.paper(model, ng.Bernoulli(), seed=1, **settings)
        return opt, torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)

    def train(opt: ng.KFAC, scheduler: Any, first: int, last: int) -> list[float]:
        losses = []
        for k in range(first, last):
            losses.append(opt.step(*_batch(k)).item())
            scheduler.step()
        return losses

    model = _model()
    opt, scheduler = make(model)
    train(opt, scheduler, 0, 5)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), scheduler.state_dict()))
    losses = train(opt, scheduler, 5, 12)
    again = _model()
    again.load_state_dict(saved[0])
    resumed, schedule = make(again)
    resumed.load_state_dict(saved[1])
    assert resumed.param_groups[0].keys() == opt.param_groups[0].keys()
    schedule.load_state_dict(saved[2])
    assert resumed.param_groups[0]["lr"] == 0.5
    assert train(resumed, schedule, 5, 12) == losses


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed_checkpoint_round_trip(form: Any, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = _model()
    opt = _optimizer(model, form)
    _train(model, opt, 0, 6)
    weights = copy.deepcopy(model.state_dict())
    dcp.save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path / "checkpoint")
    losses = _train(model, opt, 6, 10)
    again = _model()
    again.load_state_dict(weights)
    resumed = _optimizer(again, form)
    state = {"optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_optimizer_state_dict(again, resumed, state["optimizer"])
    assert _train(again, resumed, 6, 10) == losses


def test_the_state_is_plain_and_keeps_dtypes() -> None:
    model = torch.compile(_model(torch.float64), backend="eager")
    opt = _optimizer(model)
    opt.step(*_batch(0, torch.float64))
    state = opt.state_dict()
    assert state["param_groups"][0]["param_names"] == [
        "scale",
        "first.weight",
        "first.bias",
        "last.weight",
        "last.bias",
    ]
    leaves = torch.utils._pytree.tree_leaves(state)
    assert all(isinstance(leaf, Tensor | int | float | str | bool) for leaf in leaves)
    assert {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)} == {torch.float64, torch.bool, torch.uint8}
    A = state["state"][1]["A"]
    state["state"][1]["A"] = A.float()  # a state of another precision is taken as it is
    opt.load_state_dict(state)
    assert opt._running.factors["first"].A.dtype == torch.float32


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = _model()
    opt = _optimizer(model)
    _train(model, opt, 0, 3)
    before = copy.deepcopy(opt.state_dict())
    exact = _optimizer(_model(), FORMS[0])
    wider = ng.KFAC(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), ng.Bernoulli())
    lacking = copy.deepcopy(before)
    del lacking["param_groups"][0]["gamma"]
    shape = copy.deepcopy(before)
    shape["state"][1]["A"] = torch.eye(3)
    cases = {
        "with 'state' and 'param_groups'": {},
        "parameter groups of": wider.state_dict(),
        r"lacks \['gamma'\]": lacking,
        "form=": exact.state_dict(),
        r"'first.weight': A: expected a tensor of shape \(6, 6\), got shape \(3, 3\)": shape,
        "of another optimiser": torch.optim.SGD(_model().parameters(), lr=1.0).state_dict(),
    }
    for message, state in cases.items():
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    after = opt.state_dict()
    for one, other in zip(*(torch.utils._pytree.tree_leaves(s) for s in (before, after)), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_step_without_inputs_needs_lr_zero() -> None:
    opt = _optimizer(_model())
    with pytest.raises(TypeError, match="inputs are missing"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.0
    assert opt.step() is None
