"""Solutions do not depend on the scale of the right-hand side or of the matrix; and those of half precision."""

import pytest
import torch
from linalg.systems import symmetric, vector
from torch import Tensor

import natgrad as ng
from natgrad.linalg import RelativeProgress, cg, minres_qlp

SOLVERS = {"cg": cg, "minres_qlp": minres_qlp}
by_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


def exact(A: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(A.double(), b.double())


@by_solver
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(
    ("matrix", "rhs"),
    [(1, 1e-25), (1, 1e-40), (1, 1e25), (1, 1e36), (1e-20, 1e-18), (1e10, 1e18), (1e-30, 1), (1e20, 1), (1e30, 1e36)],
)
def test_numbers_whose_squares_single_precision_cannot_hold(solve, preconditioned, matrix, rhs):
    n = 12
    A, b = (symmetric(n, n, 20.0, seed=3) * matrix).float(), (vector(n, 3) * rhs).float()
    solution = solve(A, b, tol=1e-4, max_iters=60, preconditioner=torch.eye(n) if preconditioned else None)
    assert solution.reason == "converged"
    x = exact(A, b)
    assert (solution.x - x).norm() <= 3e-3 * x.norm()
    assert float(solution.rhs_norm) == pytest.approx(float(b.double().norm()), rel=1e-5)
    assert float(solution.residual_norm) <= 1e-4 * float(solution.rhs_norm)
    assert (solution.residual.double() - (b - A.double() @ solution.x.double())).norm() <= 1e-4 * b.double().norm()


@pytest.mark.parametrize("rhs", [1.0, 1e-6, 1e3])
@pytest.mark.parametrize("matrix", [1.0, 1e-3, 1e-6])
def test_conjugate_gradients_end_at_the_resolution(matrix, rhs):
    """Beyond it squares of the residual underflow, and the steps are ratios of rounding."""
    for seed in range(20):
        n = 3 + seed % 12
        A, b = (symmetric(n, n, 10.0, seed=seed) * matrix).float(), (vector(n, seed) * rhs).float()
        solution = cg(A, b, tol=0, max_iters=300)
        x = exact(A, b)
        assert solution.reason == "converged"
        assert (solution.x - x).norm() <= 2e-6 * x.norm()


@by_solver
def test_everything_scales_with_the_right_hand_side(solve):
    """The same iterations; history, warm start, dicts, rules, the model's values."""
    n, seen = 20, []

    class Watching:
        name, needs_model = "watching", True

        def __call__(self, progress):
            seen.append((float(progress.residual_norm), float(progress.rhs_norm), float(progress.model_values[-1])))
            return False

    def solved(scale):
        A, b, x0 = symmetric(n, n, 200.0).float(), vector(n).float() * scale, vector(n, 7).float() * scale
        rules = [Watching(), RelativeProgress(epsilon=1e-2, minimum=4)]
        return solve(
            lambda v: {"v": A @ v["v"]}, {"v": b}, 1e-6, 50, x0={"v": x0}, stop=rules, store=(0, 2)
        )  # fmt: skip

    power = 2.0**-83
    plain, tiny = solved(1.0), solved(power)
    assert (plain.reason, plain.iterations) == (tiny.reason, tiny.iterations)
    assert plain.reason == "relative_progress" and plain.iterations > 5
    torch.testing.assert_close(tiny.x["v"] / power, plain.x["v"])
    assert list(tiny.iterates) == list(plain.iterates)
    for i in plain.iterates:
        torch.testing.assert_close(tiny.iterates[i]["v"] / power, plain.iterates[i]["v"])
    for a, b in zip(plain.model_values, tiny.model_values, strict=True):
        assert float(b) / power**2 == pytest.approx(float(a), rel=1e-4, abs=1e-6)
    half = len(seen) // 2
    for a, b in zip(seen[:half], seen[half:], strict=True):
        assert (b[0] / power, b[1] / power, b[2] / power**2) == pytest.approx(a, rel=1e-4, abs=1e-5)


@by_solver
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_double_precision_with_a_rule_that_reads_the_model(solve, scale):
    """The model's values are squares of the scale: infinite, or zero, where double precision has no such numbers."""
    A, b = symmetric(12, 12, 20.0), vector(12) * scale
    solution = solve(A, b, 1e-10, 60, stop=RelativeProgress(minimum=30))
    assert solution.reason == "converged"
    torch.testing.assert_close(solution.x / scale, torch.linalg.solve(A, b / scale))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_negative_curvature_is_found_at_every_scale(scale):
    A, b = symmetric(8, 8, 5.0, indefinite=True).float(), vector(8).float() * scale
    solution = cg(A, b, max_iters=30)
    assert solution.reason == "negative_curvature"
    p = solution.direction.double()
    assert float(p @ A.double() @ p / (p @ p)) == pytest.approx(float(solution.curvature), rel=1e-4)
    assert solution.curvature < 0


@by_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(solve, dtype):
    """The vectors are kept in single precision: as good as the matrix and the solution are in half."""
    for seed in range(10):
        A, b = symmetric(10, 10, 8.0, seed=seed).to(dtype), vector(10, seed).to(dtype)
        solution = solve(A, b, tol=1e-3, max_iters=60)
        x = exact(A, b)
        assert solution.reason == "converged" and solution.x.dtype == solution.residual.dtype == dtype
        assert (solution.x - x).norm() <= 8 * torch.finfo(dtype).eps * x.norm()


def test_a_natural_gradient_step_in_half_precision():
    steps = []
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
        x, y = torch.randn(64, 6).to(dtype), torch.randint(0, 3, (64,))
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        opt = ng.NaturalGradient(model, ng.Categorical(), damping=0.1)
        opt.step(x, y)
        assert opt.stats["reason"] == "converged" and opt.stats["iterations"] > 5
        steps.append((torch.nn.utils.parameters_to_vector(model.parameters()) - before).double())
    assert (steps[1] - steps[0]).norm() < 0.05 * steps[0].norm()
