"""What NaturalGradient says of settings and batches that do not fit; parameters and state stay as they were."""

import pytest
import torch
from oracles.kfac import data, mlp, vector
from torch import nn

import natgrad as ng


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": "gmres"}, ValueError, "solver='gmres': expected 'minres_qlp' or 'cg'"),
        ({"damping": -1.0}, ValueError, "damping=-1.0: expected a finite number"),
        ({"l2": float("nan")}, ValueError, "l2=nan"),
        ({"lr": -0.1}, ValueError, "lr=-0.1"),
        ({"ratio": "cubic"}, ValueError, "ratio='cubic': expected one of 'quadratic'"),
        ({"parametrization": "natural"}, ValueError, "parametrization='natural'"),
        ({"damping": "much"}, TypeError, "damping='much': expected a number"),
        ({"l2": None}, TypeError, "l2=None: expected a number"),
        ({"preconditioner": 3}, TypeError, "preconditioner: expected a structure"),
        ({"preconditioner": "kfac"}, ValueError, "structure='kfac': expected one of 'full', 'block_diagonal'"),
    ],
)
def test_settings(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        ng.NaturalGradient(mlp(4, 5, 3), ng.Gaussian(), **settings)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ng.KrylovSolver(max_iters=2.5), TypeError, "max_iters=2.5: expected a whole number"),
        (lambda: ng.KrylovSolver(tol="fine"), TypeError, "tol='fine': expected a number"),
        (lambda: ng.KrylovSolver(stop=3), TypeError, "stop=3: expected a rule"),
        (lambda: ng.KroneckerPreconditioner(rows=0), ValueError, "rows=0: expected a positive number of examples"),
        (lambda: ng.KroneckerPreconditioner(rows=0.5), TypeError, "rows=0.5: expected a whole number"),
    ],
)
def test_settings_of_the_solver(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_loss_without_a_metric() -> None:
    with pytest.raises(TypeError, match="likelihood: expected an object like natgrad.Categorical.*MSELoss"):
        ng.NaturalGradient(mlp(4, 5, 3), nn.MSELoss())

    class NoMeans:
        def nll(self, z, y, *, weight=None, count=None):
            return (z - y).abs().sum()

        def count(self, z, y=None, weight=None):
            return z.new_tensor(len(z))

        def fisher_product(self, z, v):
            return v

    model = mlp(4, 5, 3)
    before = vector(model)
    opt = ng.NaturalGradient(model, NoMeans(), parametrization="probabilities")
    with pytest.raises(TypeError, match="to_mean and mean_fisher_product"):
        opt.step(*data(ng.Gaussian(), 4, 3))
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda x: x[:, :2], r"metric_inputs: \[12, 2\] torch.float64; expected what inputs have, \[12, 4\]"),
        (lambda x: x.float(), "metric_inputs: .*torch.float32; expected"),
        (lambda x: x[:0], "metric_inputs: the batch is empty"),
        (lambda x: (x, x), r"metric_inputs: \[12, 4\] torch.float64 and \[12, 4\]"),
        (lambda x: "words", "metric_inputs: expected a tensor"),
        (lambda x: [(x,)], "metric_inputs: .*must be Tensor, not list"),
        (lambda x: {"pixels": x}, "metric_inputs: a dict of 'pixels'; expected what inputs are, no dict"),
    ],
)
def test_metric_inputs_that_do_not_fit(metric, message) -> None:
    model = mlp(4, 5, 3)
    x, y = data(ng.Gaussian(), 4, 3)
    opt = ng.NaturalGradient(model, ng.Gaussian())
    before = vector(model)
    with pytest.raises(ValueError, match=message):
        opt.step(x, y, metric_inputs=metric(x))
    assert torch.equal(vector(model), before)
    assert opt.state_dict()["param_groups"][0]["update"] == 0


def test_metric_inputs_without_the_targets_that_the_metric_needs() -> None:
    model, likelihood = mlp(4, 5, 3), ng.Categorical(class_weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    x, y = data(ng.Categorical(), 4, 3)
    opt = ng.NaturalGradient(model, likelihood)
    with pytest.raises(ValueError, match="metric_inputs: the metric of Categorical.*depends on targets"):
        opt.step(x, y, metric_inputs=x)
    opt.step(x, y)
    assert opt.stats["accepted"]


def test_a_preconditioner_that_needs_the_targets_which_metric_inputs_have_not() -> None:
    model = mlp(4, 5, 3)
    x, y = data(ng.Gaussian(), 4, 3)
    opt = ng.NaturalGradient(
        model, ng.Gaussian(), preconditioner=ng.KroneckerPreconditioner(expectation="empirical"), damping=0.3
    )
    before = vector(model)
    for join in (False, True):
        with pytest.raises(ValueError, match="preconditioner: .*'empirical'.* needs targets, which metric_inputs have"):
            opt.step(x, y, metric_inputs=x, join=join)
    assert torch.equal(vector(model), before)
    opt.step(x, y)
    assert opt.stats["accepted"]


def test_calls_that_cannot_be_meant() -> None:
    model = mlp(4, 5, 3)
    x, y = data(ng.Gaussian(), 4, 3)
    opt = ng.NaturalGradient(model, ng.Gaussian())
    with pytest.raises(TypeError, match="NaturalGradient.step.*takes no closure"):
        opt.step(closure=lambda: 0)
    with pytest.raises(TypeError, match="inputs are missing"):
        opt.step()
    with pytest.raises(ValueError, match="join: needs metric_inputs"):
        opt.step(x, y, join=True)
    with pytest.raises(ValueError, match="targets: 11 examples for 12 inputs"):
        opt.step(x, y[:-1])
    with pytest.raises(ValueError, match=r"lr=2.0: with ratio=.linear."):
        ng.NaturalGradient(model, ng.Gaussian(), lr=2.0, ratio="linear").step(x, y)
    opt.param_groups[0]["lr"] = 0.0
    assert opt.step() is None


def test_states_of_others_are_refused() -> None:
    opt = ng.NaturalGradient(mlp(4, 5, 3), ng.Gaussian())
    other = ng.TONGA(mlp(4, 5, 3), ng.Gaussian())
    with pytest.raises(ValueError, match="expected the state of a NaturalGradient"):
        opt.load_state_dict(other.state_dict())


@pytest.mark.parametrize("make", [ng.NaturalGradient, ng.HessianFree], ids=["metric", "gauss_newton"])
@pytest.mark.parametrize("ignored", [slice(0, 4), slice(4, 8), slice(8, 12)], ids=["first", "middle", "last"])
def test_a_micro_batch_in_which_no_target_counts_adds_nothing(make, ignored) -> None:
    """A mean over the targets that count: one micro-batch has none, and the whole batch has some."""
    likelihood = ng.Categorical("element", ignore_index=1)
    x, y = data(ng.Categorical(), 4, 3)
    y = torch.where(y == 1, 2, y)
    y[ignored] = 1
    vectors = []
    for size in (4, None):
        model = mlp(4, 5, 3)
        opt = make(model, likelihood, damping=0.3)
        opt.step(x, y, micro_batch_size=size)
        assert opt.stats["accepted"] and opt.stats["skipped"] == 0
        vectors.append(vector(model))
    torch.testing.assert_close(*vectors, rtol=1e-6, atol=1e-8)


def test_the_preconditioner_sees_a_micro_batch_in_which_targets_count() -> None:
    model, likelihood = mlp(4, 5, 3), ng.Categorical("element", ignore_index=1)
    x, y = data(ng.Categorical(), 4, 3)
    y = torch.where(y == 1, 2, y)
    y[:6] = 1
    opt = ng.NaturalGradient(model, likelihood, damping=0.3, preconditioner="block_diagonal")
    opt.step(x, y, micro_batch_size=6)
    assert opt.stats["reason"] == "converged" and opt.stats["accepted"]
