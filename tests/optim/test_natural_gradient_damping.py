"""When NaturalGradient's rule moves λ."""

import pytest
from oracles.kfac import data, mlp

import natgrad as ng


def test_the_rule_keeps_its_period_unless_a_step_is_undone() -> None:
    """ω₁ = 0.9³ every third update; an undone step has nothing to wait for."""
    x, y = data(ng.Gaussian(), 4, 3)
    model = mlp(4, 3)  # linear: h is quadratic and G its Hessian
    rule = ng.LevenbergMarquardt(every=3, decay=0.9)
    solver = ng.KrylovSolver("cg", 1e-12, 100)
    opt = ng.NaturalGradient(model, ng.Gaussian(), solver=solver, damping=1e-3, lr=0.1, rule=rule)
    seen = []
    for _ in range(6):
        opt.step(x, y)
        seen.append(float(opt.stats["lambda"]) / 1e-3)
    assert seen == pytest.approx([1, 1, 0.9**3, 0.9**3, 0.9**3, 0.9**6])
    opt.param_groups[0]["lr"] = 2.5
    opt.step(x, y)
    assert not opt.stats["accepted"]
    assert float(opt.stats["lambda"]) == pytest.approx(1e-3 * 0.9**3)


def test_the_period_goes_on_after_loading() -> None:
    x, y = data(ng.Gaussian(), 4, 3)
    settings = {"damping": 1e-3, "lr": 0.1, "rule": ng.LevenbergMarquardt(every=2, decay=0.9)}
    opt = ng.NaturalGradient(mlp(4, 3), ng.Gaussian(), **settings)
    opt.step(x, y)
    again = ng.NaturalGradient(mlp(4, 3), ng.Gaussian(), **settings)
    again.load_state_dict(opt.state_dict())
    again.step(x, y)
    assert float(again.stats["lambda"]) == pytest.approx(1e-3 * 0.9**2)


@pytest.mark.parametrize("make", [ng.NaturalGradient, ng.HessianFree])
@pytest.mark.parametrize("rule", ["levenberg-marquardt", 0.9, lambda lam, rho: lam])
def test_what_is_no_rule_is_refused_at_once(make, rule) -> None:
    with pytest.raises(TypeError, match="rule: expected natgrad.LevenbergMarquardt"):
        make(mlp(4, 3), ng.Gaussian(), rule=rule)
