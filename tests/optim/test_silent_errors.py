"""What other K-FAC libraries get wrong in silence, each with the right number, as a training loop meets it.

One test for each error that was found by running them: the twins here differentiate the loss itself, or take the
definition of a factor apart by loops. What concerns layers alone has its twin in ``tests/layers/test_silent_errors.py``
too: weights used behind a layer's back, half precision, layers without a batch dimension.
"""

import copy
import math
from typing import Any

import pytest
import torch
from oracles.layers import draw, kronecker, softmax_fisher
from oracles.preconditioning import batch, damped_solve, exact, gradient, mlp, targets, train_once
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import to_dense

CATEGORICAL = ng.Categorical()
LAMBDA = 0.1


def factors_of(model: nn.Module, likelihood: Any, x: Tensor, y: Tensor, **settings: Any) -> dict[str, Any]:
    pre = exact(model, likelihood, **settings)
    model.zero_grad()
    z = model(x)
    pre.observe(z, y)
    likelihood.nll(z, y).backward()
    pre.step()
    return pre._running.factors


def bias_hessian(model: nn.Sequential, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of a linear model's loss with respect to its biases: for one layer that is G."""
    z = model(x).detach()
    found = torch.autograd.functional.hessian(lambda b: loss(z + b, y), torch.zeros_like(z[0]))
    assert isinstance(found, Tensor)
    return found


LOSSES: dict[str, Any] = {
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)),
    "class weights, summed": nn.CrossEntropyLoss(
        weight=torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64), reduction="sum"
    ),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.3),
    "pos_weight": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_pos_weight_and_ignore_index_enter_the_factors(name: str) -> None:
    loss, likelihood = LOSSES[name], ng.likelihood_of(LOSSES[name])
    model, x = mlp(4, 3), batch()
    y = torch.tensor([0, 1, 2] * 4)
    if name == "pos_weight":
        y = nn.functional.one_hot(y, 3).double()
    G = to_dense(factors_of(model, likelihood, x, y)["0"].G)
    torch.testing.assert_close(G, bias_hessian(model, loss, x, y), rtol=1e-9, atol=1e-13)
    plain = nn.BCEWithLogitsLoss() if name == "pos_weight" else nn.CrossEntropyLoss(reduction=loss.reduction)
    if name != "label smoothing":  # which leaves the curvature alone
        assert (G - bias_hessian(model, plain, x, y)).norm() > 0.05 * G.norm()


def test_a_module_used_twice_sums_its_inputs_and_averages_its_derivatives() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.head = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.a(torch.tanh(self.a(x)))))

    model, x, y = Twice(), batch(d=3), targets(CATEGORICAL)
    found = factors_of(model, CATEGORICAL, x, y)["a"]
    A, G = torch.zeros(4, 4).double(), torch.zeros(3, 3).double()
    for one in x:
        s1 = model.a(one)
        h = torch.tanh(s1)
        s2 = model.a(h)
        z = model.head(torch.tanh(s2))
        F = softmax_fisher(z.detach())
        for a, s in ((one, s1), (h, s2)):
            J = torch.stack([torch.autograd.grad(value, s, retain_graph=True)[0] for value in z])
            row = torch.cat([a, a.new_ones(1)]).detach()
            A += torch.outer(row, row) / 12
            G += J.T @ F @ J / 12 / 2
    torch.testing.assert_close(found.A, A, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.G, G, rtol=1e-9, atol=1e-14)


class ConvNet(nn.Module):
    def __init__(self, activation: nn.Module, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.activation = nn.Conv2d(4, 4, 3, padding=1, **options), activation
        self.head = nn.Linear(36, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 4},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect"},
        {"padding_mode": "replicate"},
    ],
    ids=str,
)
def test_grouped_convolutions_and_padding_modes(options: dict[str, Any]) -> None:
    model, x, y = ConvNet(nn.Tanh(), **options), draw(4, 4, 3, 3), torch.tensor([0, 1, 2, 0])
    A, G = kronecker(model, model.conv, x, softmax_fisher)
    found = factors_of(model, CATEGORICAL, x, y)["conv"]
    torch.testing.assert_close(found.A, A, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.G, G, rtol=1e-9, atol=1e-14)


def test_factors_are_not_off_by_the_number_of_positions() -> None:
    """A linear map at each of 7 positions and a summed loss: A ⊗ G is the Hessian, with no factor T or 1/T."""
    model, gaussian = mlp(4, 3), ng.Gaussian()
    x, y = draw(5, 7, 4), draw(5, 7, 3, seed=1)
    found = factors_of(model, gaussian, x, y)["0"]
    W = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    ones = torch.cat([x, torch.ones(5, 7, 1, dtype=x.dtype)], 2)
    H = torch.autograd.functional.hessian(lambda V: gaussian.nll(ones @ V.view(5, 3), y), W.T.reshape(-1))
    torch.testing.assert_close(found.to_dense(), H, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("copies", [2, 10])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_factors_are_not_off_by_the_number_of_examples(copies: int, expectation: str) -> None:
    """The same examples several times over are the same mean loss, with the same curvature."""
    model, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    once = factors_of(model, CATEGORICAL, x, y, expectation=expectation)
    often = factors_of(model, CATEGORICAL, x.repeat(copies, 1), y.repeat(copies), expectation=expectation)
    for name, factors in once.items():
        torch.testing.assert_close(often[name].to_dense(), factors.to_dense(), rtol=1e-9, atol=1e-14)


def test_ekfac_turns_into_its_basis_and_back_and_not_the_other_way_round() -> None:
    """With one example F is one Kronecker product and EKFAC is exact; Q in the place of Qᵀ would be far off."""
    model, x, y = mlp(4, 3), batch(1), torch.tensor([2])
    pre = exact(model, CATEGORICAL, structure="ekfac", form=None)
    for _ in range(2):  # the second step has second moments of its own
        found = train_once(model, pre, CATEGORICAL, x, y)
    names = [name for name, _ in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = {names[0]: flat[:12].view(3, 4), names[1]: flat[12:]}
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    H, g = torch.autograd.functional.hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat)
    torch.testing.assert_close(found, damped_solve(H, LAMBDA, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiled_before_gets_its_factors_or_an_error(backend: str) -> None:
    model, x, y = mlp(4, 5, 3), batch(), targets(CATEGORICAL)
    expected = factors_of(model, CATEGORICAL, x, y)
    compiled = torch.compile(model, backend=backend)
    compiled(x)  # the code exists before any hook
    pre = exact(compiled, CATEGORICAL)
    with pytest.raises(RuntimeError, match=r"call update\(x\) instead"):
        pre.observe(compiled(x))
    pre.update(x)
    CATEGORICAL.nll(compiled(x), y).backward()
    pre.step()
    for name, factors in expected.items():
        torch.testing.assert_close(pre._running.factors[name].to_dense(), factors.to_dense(), rtol=1e-9, atol=1e-13)
    torch._dynamo.reset()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardtanh])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_activations_in_place_do_not_change_the_derivatives(activation: Any, expectation: str) -> None:
    x, y = draw(4, 4, 3, 3), torch.tensor([0, 1, 2, 0])
    plain, inplace = (ConvNet(activation(**options)) for options in ({}, {"inplace": True}))
    if expectation == "exact":
        A, G = kronecker(plain, plain.conv, x, softmax_fisher)
    else:
        twin = factors_of(plain, CATEGORICAL, x, y, expectation=expectation)["conv"]
        A, G = twin.A, twin.G
    found = factors_of(inplace, CATEGORICAL, x, y, expectation=expectation)["conv"]
    torch.testing.assert_close(found.A, A, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.G, G, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_leave_no_hooks_and_no_statistics_behind(error: Any) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fails = mlp(4, 5, 3), False

        def forward(self, x: Tensor) -> Tensor:
            z = self.net(x)
            if self.fails:
                raise error("in the middle")
            return z

    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    model, x, y = Failing(), batch(), targets(CATEGORICAL)
    expected = train_once(model, exact(model, CATEGORICAL), CATEGORICAL, x, y)
    assert hooks(model) == 0
    pre = exact(model, CATEGORICAL)
    present = hooks(model)
    model.fails = True
    for call in (model, pre.update):
        with pytest.raises(error):
            call(x)
    model.fails = False
    assert hooks(model) == present and not pre.capture.recording
    torch.testing.assert_close(train_once(model, pre, CATEGORICAL, x, y), expected, rtol=1e-12, atol=0)
    del pre, call
    assert hooks(model) == 0


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "input_covariance"])
def test_double_precision_is_not_cut_to_single(structure: str) -> None:
    """At λ = 1e-10 an inverse of factors in single precision would be off by far more than a millionth."""
    model, x = mlp(4, 3), batch()
    gaussian = ng.Gaussian()
    y = targets(gaussian)
    pre = exact(
        model, gaussian, structure=structure, form=None if structure != "block_diagonal" else EXACT, damping=1e-10
    )
    for _ in range(2):
        found = train_once(model, pre, gaussian, x, y)
    ones = torch.cat([x, torch.ones(12, 1, dtype=x.dtype)], 1)
    V = torch.linalg.lstsq(ones, model(x).detach() - y).solution.T  # G = I: Newton's step on least squares
    torch.testing.assert_close(found, torch.cat([V[:, :4].reshape(-1), V[:, 4]]), rtol=1e-7, atol=1e-9)
    for layer in pre.state_dict()["layers"].values():
        assert all(t.dtype == torch.float64 for t in layer.values() if t.is_floating_point())


EXACT = ng.ExactTikhonov()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "input_covariance"])
@pytest.mark.parametrize("expectation", ["exact", "sampled", "empirical"])
def test_one_bad_batch_does_not_poison_the_factors(bad: float, structure: str, expectation: str) -> None:
    x, y = batch(), targets(CATEGORICAL)
    spoilt = x.clone()
    spoilt[3, 1] = bad
    results = []
    for batches in ([x, spoilt, x], [x, x]):
        model = mlp(4, 5, 3)
        pre = exact(model, CATEGORICAL, structure=structure, expectation=expectation, form=None)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = ng.Preconditioned(inner, pre)
        for inputs in batches:
            optimizer.zero_grad()
            z = model(inputs)
            pre.observe(z, y)
            CATEGORICAL.nll(z, y).backward()
            optimizer.step()
        assert optimizer.skipped == len(batches) - 2 == pre.stats["skipped"]
        results.append((gradient(model), copy.deepcopy(pre._running.factors)))
    (g, found), (h, expected) = results
    assert torch.isfinite(g).all()
    if expectation != "sampled":  # whose draws differ: the bad batch drew too
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-14)
        for name, factors in expected.items():
            torch.testing.assert_close(found[name].to_dense(), factors.to_dense(), rtol=1e-10, atol=1e-14)
