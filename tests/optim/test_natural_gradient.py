"""The natural-gradient step against the dense solve; metrics of other inputs; damping by ρ; what bad batches get."""

import math
from typing import Any

import pytest
import torch
from oracles import networks
from oracles.kfac import data, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.linalg import RelativeProgress

LIKELIHOODS = {
    "gaussian": ng.Gaussian(),
    "bernoulli": ng.Bernoulli(normalizer="element"),
    "categorical": ng.Categorical(),
}
EXACT = {name: ng.KrylovSolver(name, tol=1e-13, max_iters=300) for name in ("cg", "minres_qlp")}


def dense_step(model: nn.Module, likelihood: Any, x: Any, y: Any, damping: float, metric: Any = None) -> Tensor:
    """−(G + λ I)^{-1} ∇h."""
    G = ng.Fisher(model, likelihood, x if metric is None else metric).to_dense()
    gradient = gradient_of(model, likelihood, x, y)
    return -torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), gradient)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("family", LIKELIHOODS)
def test_a_step_is_the_dense_solve(family: str, solver: str) -> None:
    model, likelihood = mlp(4, 5, 3), LIKELIHOODS[family]
    x, y = data(likelihood, 4, 3)
    expected, before = dense_step(model, likelihood, x, y, 0.3), vector(model)
    loss = likelihood.nll(model(x), y)
    opt = ng.NaturalGradient(model, likelihood, solver=EXACT[solver], lr=0.5, damping=0.3)
    found = opt.step(x, y)
    torch.testing.assert_close(vector(model) - before, 0.5 * expected)
    torch.testing.assert_close(found, loss.detach())
    assert opt.stats["step_norm"] == pytest.approx(0.5 * float(expected.norm()))
    assert opt.stats["reason"] == "converged"
    assert opt.stats["products"] == opt.stats["iterations"] > 3


@pytest.mark.parametrize(
    "name",
    ["tied", "tied_bias", "scalar", "layer_norm", "conv", "tuple", "mapping", "sequence", "frozen", "forward"],
)
@pytest.mark.parametrize("solver", EXACT)
def test_any_model_and_call_convention(name: str, solver: str) -> None:
    case = networks.case(name)
    y = networks.targets("gaussian", case.z)
    G = ng.Fisher(case.model, ng.Gaussian(), case.x, forward=case.forward).to_dense()
    view = ng.Jacobian(case.model, case.x, forward=case.forward)
    gradient = view.T @ ((case.z - y) / len(y)).reshape(-1)
    before = {n: p.clone() for n, p in case.model.named_parameters()}
    ng.NaturalGradient(case.model, ng.Gaussian(), solver=EXACT[solver], damping=0.2, forward=case.forward).step(
        case.x, y
    )
    moved = torch.cat([(p - before[n]).reshape(-1) for n, p in case.model.named_parameters() if p.requires_grad])
    torch.testing.assert_close(moved, -torch.linalg.solve(G + 0.2 * torch.eye(len(G), dtype=G.dtype), gradient))
    assert all(torch.equal(p, before[n]) for n, p in case.model.named_parameters() if not p.requires_grad)


def test_chain_and_autodiff_take_the_same_steps() -> None:
    """The products of a plain chain are written by hand; a function around it is differentiated by autograd."""
    likelihood = ng.Bernoulli()
    by_hand, by_autodiff = mlp(4, 5, 3), mlp(4, 5, 3)
    x, y = data(likelihood, 4, 3)
    a = ng.NaturalGradient(by_hand, likelihood, damping=0.1)
    b = ng.NaturalGradient(by_autodiff, likelihood, damping=0.1, forward=lambda model, inputs: model(inputs))
    for _ in range(4):
        a.step(x, y)
        b.step(x, y)
    torch.testing.assert_close(vector(by_hand), vector(by_autodiff), rtol=1e-9, atol=1e-12)
    assert a.stats["rho"] == pytest.approx(b.stats["rho"])


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_metric_of_other_inputs_changes_the_metric_and_not_the_gradient(name: str) -> None:
    case, likelihood = networks.case(name), ng.Gaussian()
    y, other = networks.targets("gaussian", case.z), networks.case(name, seed=5).x[:2]
    G, U = (ng.Fisher(case.model, likelihood, inputs).to_dense() for inputs in (case.x, other))
    gradient, before = gradient_of(case.model, likelihood, case.x, y), vector(case.model)
    eye = 0.1 * torch.eye(len(G), dtype=G.dtype)
    n, m = len(case.x), len(other)
    for metric, options in ((U, {}), ((n * G + m * U) / (n + m), {"join": True})):
        opt = ng.NaturalGradient(case.model, likelihood, solver=EXACT["cg"], damping=0.1, rule=None, guard=False)
        opt.step(case.x, y, metric_inputs=other, **options)
        torch.testing.assert_close(vector(case.model) - before, -torch.linalg.solve(metric + eye, gradient))
        nn.utils.vector_to_parameters(before.clone(), case.model.parameters())


@pytest.mark.parametrize("forward", [None, lambda model, inputs: model(inputs)])
def test_micro_batches_are_one_batch(forward: Any) -> None:
    model, likelihood = mlp(4, 5, 3), ng.Bernoulli(normalizer="element")
    x, y = data(likelihood, 4, 3)
    expected, before = dense_step(model, likelihood, x, y, 0.3), vector(model)
    for step in (
        lambda opt: opt.step(x, y, micro_batch_size=5),
        lambda opt: opt.step([(x[:7], y[:7]), (x[7:], y[7:])]),
        lambda opt: opt.step(x, y, micro_batch_size=4, metric_inputs=x),
    ):
        step(ng.NaturalGradient(model, likelihood, solver=EXACT["cg"], damping=0.3, forward=forward))
        torch.testing.assert_close(vector(model) - before, expected)
        nn.utils.vector_to_parameters(before.clone(), model.parameters())


def test_l2_is_in_the_gradient_and_in_the_system() -> None:
    model, likelihood = mlp(4, 5, 3), ng.Gaussian()
    x, y = data(likelihood, 4, 3)
    G, before = ng.Fisher(model, likelihood, x).to_dense(), vector(model)
    gradient = gradient_of(model, likelihood, x, y) + 0.05 * before
    expected = -torch.linalg.solve(G + 0.25 * torch.eye(len(G), dtype=G.dtype), gradient)
    opt = ng.NaturalGradient(model, likelihood, solver=EXACT["cg"], damping=0.2, l2=0.05)
    opt.step(x, y)
    torch.testing.assert_close(vector(model) - before, expected)
    h = [likelihood.nll(model(x), y) + 0.025 * vector(model).square().sum()]
    nn.utils.vector_to_parameters(before.clone(), model.parameters())
    h.append(likelihood.nll(model(x), y) + 0.025 * before.square().sum())
    system = G + 0.25 * torch.eye(len(G), dtype=G.dtype)
    predicted = gradient @ expected + 0.5 * expected @ system @ expected
    assert opt.stats["rho"] == pytest.approx(((h[0] - h[1]) / predicted).item())


def quadratic() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A linear model and a squared error: h is quadratic and G its Hessian."""
    model, likelihood = nn.Linear(3, 2, dtype=torch.float64), ng.Gaussian()
    x, y = data(likelihood, 3, 2)
    return model, likelihood, x, y


@pytest.mark.parametrize("lr", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("iterations", [2, 100])
@pytest.mark.parametrize("solver", ["cg", "minres_qlp"])
def test_on_a_quadratic_the_ratio_is_one(solver: str, iterations: int, lr: float) -> None:
    """Undamped, at every learning rate and wherever the solver stops; eq. 30 as printed has 1 − lr/2."""
    for ratio, expected in (("quadratic", 1.0), ("linear", 1.0), ("published", 1 - lr / 2)):
        if solver == "minres_qlp" and iterations == 2 and ratio != "quadratic":
            continue  # eq. 30 is that of an exact solution, or of CG, whose residual is orthogonal to x
        model, likelihood, x, y = quadratic()
        settings: dict[str, Any] = {"damping": 0.0, "lr": lr, "ratio": ratio, "rule": None}
        opt = ng.NaturalGradient(model, likelihood, solver=ng.KrylovSolver(solver, 1e-12, iterations), **settings)
        opt.step(x, y)
        assert opt.stats["rho"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ratio", "factor"), [("quadratic", 2 / 3), ("linear", 2 / 3), ("published", 1.0)])
def test_damping_follows_the_ratio(ratio: Any, factor: float) -> None:
    """At lr = 1 the published ratio of a perfect step is 1/2, so that it never lowers λ."""
    model, likelihood, x, y = quadratic()
    opt = ng.NaturalGradient(model, likelihood, solver=EXACT["cg"], damping=1e-3, ratio=ratio)
    opt.step(x, y)
    assert opt.stats["lambda"] == pytest.approx(1e-3 * factor)


def test_a_step_that_raises_the_loss_is_undone_and_raises_the_damping() -> None:
    model, likelihood, x, y = quadratic()
    before = vector(model)
    opt = ng.NaturalGradient(model, likelihood, solver=EXACT["cg"], damping=1e-6, lr=2.5)
    opt.step(x, y)
    assert torch.equal(vector(model), before)
    assert (opt.stats["accepted"], opt.stats["rejected"], opt.stats["step_norm"]) == (False, 1, 0)
    assert opt.stats["lambda"] == pytest.approx(1.5e-6)
    free = ng.NaturalGradient(model, likelihood, solver=EXACT["cg"], damping=1e-6, lr=2.5, guard=False)
    free.step(x, y)
    assert not torch.equal(vector(model), before)
    assert free.stats["accepted"]


def test_learning_rate_schedules_work() -> None:
    model, likelihood, x, y = quadratic()
    opt = ng.NaturalGradient(model, likelihood, lr=0.5, damping=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, ng.training.HyperbolicDecay(after=2, scale=4))
    rates = []
    for _ in range(7):
        rates.append(opt.param_groups[0]["lr"])
        opt.step(x, y)
        scheduler.step()
    assert rates == pytest.approx([0.5, 0.5, 0.4, 0.5 / 1.5, 0.5 / 1.75, 0.25, 0.5 / 2.25])
    assert ng.training.HyperbolicDecay()(199) == 1
    assert ng.training.HyperbolicDecay()(219) == pytest.approx(0.5)


@pytest.mark.parametrize("solver", ["cg", "minres_qlp"])
@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "exact_block"])
def test_curvature_as_preconditioner_changes_the_way_and_not_the_solution(structure: str, solver: str) -> None:
    model, likelihood = mlp(6, 8, 4), ng.Bernoulli()
    x, y = data(likelihood, 6, 4, n=40)
    expected, before = dense_step(model, likelihood, x, y, 0.01), vector(model)
    opt = ng.NaturalGradient(
        model, likelihood, solver=ng.KrylovSolver(solver, 1e-10, 500), damping=0.01, preconditioner=structure
    )
    opt.step(x, y)
    torch.testing.assert_close(vector(model) - before, expected, rtol=1e-5, atol=1e-6)
    assert opt.stats["relative_residual"] <= 1e-10


@pytest.mark.parametrize("solver", ["cg", "minres_qlp"])
def test_where_the_kronecker_factors_are_exact_one_iteration_is_enough(solver: str) -> None:
    """One linear layer and a Gaussian: F = A ⊗ I."""
    iterations = []
    for made in (None, ng.KroneckerPreconditioner(kind="exact", expectation="exact")):
        model, likelihood, x, y = quadratic()
        settings: dict[str, Any] = {"damping": 0.05, "preconditioner": made}
        opt = ng.NaturalGradient(model, likelihood, solver=ng.KrylovSolver(solver, 1e-9), **settings)
        opt.step(x, y)
        iterations.append(opt.stats["iterations"])
    assert iterations == [4, 1]  # four different eigenvalues


def test_other_preconditioners() -> None:
    model, likelihood = mlp(4, 5, 3), ng.Gaussian()
    x, y = data(likelihood, 4, 3)
    G, before = ng.Fisher(model, likelihood, x).to_dense(), vector(model)
    inverse = torch.linalg.inv(G + 0.1 * torch.eye(len(G), dtype=G.dtype))
    for made in (inverse, lambda view, likelihood, inputs, targets, damping, generator: inverse):
        opt = ng.NaturalGradient(model, likelihood, solver="cg", damping=0.1, preconditioner=made)
        opt.step(x, y)
        assert (opt.stats["iterations"], opt.stats["reason"]) == (1, "converged")
        nn.utils.vector_to_parameters(before.clone(), model.parameters())
    some = ng.KroneckerPreconditioner(rows=5, kind="exact")
    opt = ng.NaturalGradient(model, likelihood, damping=0.1, preconditioner=some)
    opt.step(x, y)
    assert opt.stats["accepted"]


def test_rules_of_the_solver() -> None:
    model, likelihood = mlp(6, 20, 20, 4), ng.Bernoulli()
    x, y = data(likelihood, 6, 4)
    solver = ng.KrylovSolver("cg", tol=0.0, max_iters=200, stop=(RelativeProgress(),))
    opt = ng.NaturalGradient(model, likelihood, solver=solver, damping=1e-3)
    opt.step(x, y)
    assert opt.stats["reason"] == "relative_progress"
    assert opt.stats["iterations"] < 200


def test_the_metric_in_the_probabilities_gives_the_same_step() -> None:
    models = mlp(4, 5, 3), mlp(4, 5, 3)
    likelihood = ng.Categorical()
    x, y = data(likelihood, 4, 3)
    for model, space in zip(models, ("logits", "probabilities"), strict=True):
        ng.NaturalGradient(model, likelihood, damping=0.1, parametrization=space).step(x, y)
    torch.testing.assert_close(vector(models[0]), vector(models[1]))


class Dropped(nn.Module):
    """Dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_one_step_is_one_function_and_the_next_another() -> None:
    """Products and ρ see the masks of the gradient; running statistics move once; the next step has other masks."""
    torch.manual_seed(0)
    model, likelihood = Dropped(), ng.Gaussian()
    x, y = data(likelihood, 4, 3)
    state = torch.get_rng_state()
    loss = likelihood.nll(model(x), y)
    after, running = torch.get_rng_state(), model.body[1].running_mean.clone()
    torch.set_rng_state(state)
    model.body[1].reset_running_stats()
    opt = ng.NaturalGradient(model, likelihood, lr=1e-4)
    found = opt.step(x, y)
    torch.testing.assert_close(found, loss.detach())
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(model.body[1].running_mean, running)
    assert opt.stats["rho"] == pytest.approx(1, abs=0.01)  # another mask would give anything


def test_skips_what_is_not_finite() -> None:
    model, likelihood = mlp(4, 5, 3), ng.Gaussian()
    x, y = data(likelihood, 4, 3)
    opt = ng.NaturalGradient(model, likelihood, damping=0.5)
    before, broken = vector(model), x.clone()
    broken[2, 1] = math.nan
    assert math.isnan(float(opt.step(broken, y)))
    opt.step(x, y, metric_inputs=broken)
    assert torch.equal(vector(model), before)
    assert (opt.stats["skipped"], opt.stats["updates"], opt.stats["reason"]) == (2, 2, "non_finite")
    assert opt.stats["lambda"] == 0.5
    opt.step(x, y)
    assert opt.stats["accepted"] and opt.stats["skipped"] == 2


def test_products_that_are_not_finite() -> None:
    model = mlp(4, 5, 3)

    class Broken(ng.Gaussian):
        def fisher_product(self, z: Tensor, v: Tensor) -> Tensor:
            return super().fisher_product(z, v) * math.inf

    x, y = data(ng.Gaussian(), 4, 3)
    before = vector(model)
    opt = ng.NaturalGradient(model, Broken(), damping=0.5)
    opt.step(x, y)
    assert torch.equal(vector(model), before)
    assert (opt.stats["reason"], opt.stats["skipped"], opt.stats["lambda"]) == ("non_finite", 1, 0.5)


def test_a_gradient_of_zero_is_no_step() -> None:
    model, x = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)[0]
    before = vector(model)
    opt = ng.NaturalGradient(model, ng.Gaussian(), damping=0.5)
    loss = opt.step(x, model(x).detach())
    assert float(loss) == 0
    assert torch.equal(vector(model), before)
    assert (opt.stats["reason"], opt.stats["iterations"], opt.stats["step_norm"]) == ("zero_rhs", 0, 0)
    assert opt.stats["lambda"] == 0.5


@pytest.mark.parametrize("preconditioner", [None, "block_diagonal"])
def test_resumes_bit_for_bit(preconditioner: Any, tmp_path: Any) -> None:
    def make() -> tuple[nn.Module, ng.NaturalGradient]:
        model = mlp(4, 5, 3)
        return model, ng.NaturalGradient(model, ng.Bernoulli(), damping=0.5, preconditioner=preconditioner, seed=3)

    x, y = data(ng.Bernoulli(), 4, 3)
    model, opt = make()
    for _ in range(3):
        opt.step(x, y)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    for _ in range(3):
        opt.step(x, y)
    again, resumed = make()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["opt"])
    for _ in range(3):
        resumed.step(x, y)
    assert torch.equal(vector(model), vector(again))
    assert opt.stats["lambda"] == resumed.stats["lambda"]


def test_trains_float32_networks_faster_than_steps_of_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(200, 6)
    y = torch.stack([torch.sin(x[:, 0] * x[:, 1]), x[:, 2].square()], dim=1)
    opt = ng.NaturalGradient(model, ng.Gaussian(), damping=1.0)
    losses = [float(opt.step(x, y)) for _ in range(40)]
    assert losses[-1] < 0.05 * losses[0]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:], strict=False))
