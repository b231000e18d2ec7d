"""The quadratic model on a subspace against its dense self, and the rules for λ and γ against their definitions."""

import pytest
import torch

from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.quadratic import Subspace, best_coefficients, best_step, reduction_ratio, rounding_of


def _problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return root @ root.T + torch.eye(6), torch.randn(6, generator=generator), torch.randn(6, 2, generator=generator)


def _subspace(H: torch.Tensor, g: torch.Tensor, D: torch.Tensor) -> Subspace:
    return Subspace(D.T.double() @ g.double(), D.T.double() @ H @ D.double())


def test_coefficients_minimise_the_model_over_the_plane() -> None:
    H, g, D = _problem()
    model = _subspace(H, g, D)
    found = best_coefficients(model)
    expected = torch.linalg.solve(D.T.double() @ H @ D.double(), -(D.T.double() @ g.double()))
    torch.testing.assert_close(found, expected)
    delta = D.double() @ found
    torch.testing.assert_close(model.change(found), g.double() @ delta + 0.5 * delta @ H @ delta)
    # at the optimum the decrease is half the slope, M(δ) − M(0) = ½ ∇h·δ
    torch.testing.assert_close(model.change(found), 0.5 * g.double() @ delta)


@pytest.mark.parametrize("second", ["zero", "collinear"])
def test_one_dimension_when_the_previous_update_adds_none(second: str) -> None:
    H, g, D = _problem()
    D[:, 1] = 0 if second == "zero" else -3 * D[:, 0]
    model = _subspace(H, g, D)
    d = D[:, 0].double()
    alpha = -(g.double() @ d) / (d @ H @ d)
    torch.testing.assert_close(best_step(model), alpha)
    torch.testing.assert_close(best_coefficients(model), torch.stack((alpha, torch.zeros_like(alpha))))


def test_negative_curvature_gives_no_step() -> None:
    model = Subspace(torch.tensor([1.0]), torch.tensor([[-2.0]]))
    assert best_step(model) == 0


def test_reduction_ratio_of_rounding_errors_moves_no_rule() -> None:
    h = torch.tensor(2.0, dtype=torch.float64)
    noise = rounding_of(h, torch.float32)
    assert noise.item() == pytest.approx(10 * 2.0 * 2**-23)
    cases = [
        (-1e-7, -2e-6, 0.0, 0.5),  # both below the noise
        (-1e-7, -2e-6, 0.9, 1.0),  # λ alone made the step so short
        (-1e-5, -2e-5, 0.9, 0.5),  # the ratio itself
        (1e-5, -1e-6, 0.9, -10.0),  # what was foretold is below the noise, what came is not
    ]
    for actual, predicted, damped, expected in cases:
        found = reduction_ratio(h.new_tensor(actual), h.new_tensor(predicted), noise, h.new_tensor(damped))
        assert found.item() == pytest.approx(expected)


def test_reduction_ratio_of_an_overflow_is_minus_infinity() -> None:
    assert reduction_ratio(torch.tensor(-1.0), torch.tensor(-2.0)) == 0.5
    assert reduction_ratio(torch.tensor(torch.inf), torch.tensor(-2.0)) == -torch.inf
    assert reduction_ratio(torch.tensor(torch.nan), torch.tensor(-2.0)) == -torch.inf


@pytest.mark.parametrize(
    ("rho", "factor"), [(0.8, 0.95**5), (0.5, 1.0), (0.2, 0.95**-5), (-1.0, 0.95**-5), (torch.nan, 1.0)]
)
def test_lambda_rule(rho: float, factor: float) -> None:
    lam = torch.tensor(150.0, dtype=torch.float64)
    new = LevenbergMarquardt()(lam, torch.tensor(rho, dtype=torch.float64))
    assert new.item() == pytest.approx(150 * factor, rel=1e-12)


def test_lambda_rule_has_a_floor() -> None:
    rule = LevenbergMarquardt(every=1, decay=0.5, minimum=0.3)
    assert rule(torch.tensor(0.4), torch.tensor(1.0)).item() == pytest.approx(0.3)
    assert rule(torch.tensor(0.4), torch.tensor(1.0), scale=torch.tensor(0.9)).item() == pytest.approx(0.27)
    # a λ that is below the floor already is left alone, not raised
    assert rule(torch.tensor(0.1), torch.tensor(1.0)).item() == pytest.approx(0.1)


def test_gamma_candidates() -> None:
    gamma, omega = torch.tensor(2.0, dtype=torch.float64), (19 / 20) ** 10
    found = [value.item() for value in GreedyGamma().candidates(gamma, torch.tensor(1.0))]
    assert found == pytest.approx([2.0, 2.0 * omega, 2.0 / omega], rel=1e-12)
    bounded = GreedyGamma(bounded=True, minimum=1.5).candidates(gamma, torch.tensor(2.5, dtype=torch.float64))
    assert [value.item() for value in bounded] == pytest.approx([2.0, 1.5, 2.5])


@pytest.mark.parametrize(
    "make",
    [
        lambda: LevenbergMarquardt(every=0),
        lambda: LevenbergMarquardt(decay=1.5),
        lambda: GreedyGamma(every=0),
        lambda: GreedyGamma(quality="best"),
    ],
)
def test_rules_refuse_settings_out_of_range(make: object) -> None:
    with pytest.raises(ValueError, match=r"LevenbergMarquardt\(|GreedyGamma\("):
        make()  # type: ignore[operator]
