"""Structures, forms, damping by layer, layers left out, groups of parameters, and how long the result is."""

import io
import math
import re
from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, damped_solve, exact, fisher, gradient, mlp, plain, targets, train_once
from torch import Tensor, nn

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov

LIKELIHOOD = ng.Categorical()
FORMS = {
    ("block_diagonal", "factored"): FactoredTikhonov(),
    ("block_diagonal", "exact"): ExactTikhonov(),
    ("ekfac", "exact"): ExactTikhonov(),
    ("input_covariance", "exact"): ExactTikhonov(),
}


def solved(model: nn.Module, structure: str, kind: str, x: Tensor, damping: float, g: Tensor) -> Tensor:
    """``kronecker_fisher(...).inverse(...)`` of the same batch, whose dense twin is tested elsewhere."""
    k = ng.kronecker_fisher(model, LIKELIHOOD, x, structure=structure, expectation="exact")
    return k.inverse(damping=damping, kind=kind) @ g


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize(("structure", "kind"), FORMS, ids="-".join)
def test_every_structure_and_form(structure: str, kind: str, update: bool) -> None:
    """The first estimate has no basis to take second moments in, so that EKFAC starts as K-FAC and gets them next."""
    model, x, y = mlp(4, 5, 3), batch(), targets(LIKELIHOOD)
    g = plain(model, LIKELIHOOD, x, y)
    pre = exact(model, LIKELIHOOD, structure=structure, form=FORMS[structure, kind])
    for _ in range(3):
        model.zero_grad()
        z = model(x)
        pre.update(x) if update else pre.observe(z)
        LIKELIHOOD.nll(z, y).backward()
        pre.step()
    if structure == "ekfac":  # S of three equal estimates: (S_KFAC + 2 S_EKFAC) / 3 by the decayed average
        S = {name: pre._inverses.scalings[name] for name in pre.coverage().layers}
        assert all((s > 0).any() for s in S.values())
        found = gradient(model)
        expected = []
        F = ng.kronecker_fisher(model, LIKELIHOOD, x, structure="ekfac", expectation="exact")
        K = fisher(model, LIKELIHOOD, x)
        for name in S:
            basis = pre._inverses._kept[name]
            Q = torch.kron(basis.QA, basis.QG)
            own = block_of(F, name, model)
            kron = K.factors[name].to_dense()
            M = Q @ torch.diag((Q.T @ (kron / 3 + 2 * own / 3) @ Q).diagonal()) @ Q.T
            layer = dict(model.named_modules())[name]
            V = torch.cat([grad_of(g, model, layer.weight), grad_of(g, model, layer.bias)[:, None]], 1)
            U = damped_solve(M, 0.1, V.T.reshape(-1)).view(V.shape[1], V.shape[0]).T
            expected += [U[:, :-1].reshape(-1), U[:, -1]]
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-7, atol=1e-10)
        return
    torch.testing.assert_close(gradient(model), solved(model, structure, kind, x, 0.1, g), rtol=1e-9, atol=1e-12)


def block_of(F: Any, name: str, model: nn.Module) -> Tensor:
    """A layer's block of an operator, on the stacked columns of [W b]."""
    dense, start = F.to_dense(order="vec"), 0
    for other, layer in model.named_children():
        size = sum(p.numel() for p in layer.parameters())
        if other == name:
            return dense[start : start + size, start : start + size]
        start += size
    raise AssertionError(name)


def grad_of(g: Tensor, model: nn.Module, wanted: Tensor) -> Tensor:
    start = 0
    for p in model.parameters():
        if p is wanted:
            return g[start : start + p.numel()].view_as(p)
        start += p.numel()
    raise AssertionError


@pytest.mark.parametrize("form", [ExactTikhonov(), FactoredTikhonov()], ids=lambda form: type(form).__name__)
def test_damping_by_layer(form: Any) -> None:
    model, x, y = mlp(4, 3, 3, 3), batch(), targets(LIKELIHOOD)
    g, kind = plain(model, LIKELIHOOD, x, y), "exact" if isinstance(form, ExactTikhonov) else "factored"
    pre = exact(model, LIKELIHOOD, form=form, damping={"": 0.1, "2": 0.7, "4": 0.2})
    assert pre.damping == {"0": 0.1, "2": 0.7, "4": 0.2}
    found = train_once(model, pre, LIKELIHOOD, x, y)
    parts = {value: solved(model, "block_diagonal", kind, x, value, g) for value in (0.1, 0.7, 0.2)}
    expected = torch.cat([parts[0.1][:15], parts[0.7][15:27], parts[0.2][27:]])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    pre.damping = {"4": 0.1}  # the others stay
    assert pre.damping == {"0": 0.1, "2": 0.7, "4": 0.1} == pre.stats["damping"] | {"4": 0.1}
    file = io.BytesIO()
    torch.save(pre.state_dict(), file)
    file.seek(0)
    other = exact(model, LIKELIHOOD, form=form)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.damping == pre.damping
    pre.damping = 0.3
    assert pre.damping == 0.3
    expected = solved(model, "block_diagonal", kind, x, 0.3, g)
    torch.testing.assert_close(train_once(model, pre, LIKELIHOOD, x, y), expected, rtol=1e-9, atol=1e-12)


class Nested(nn.Module):
    """A body of two layers and a head, with parameters that no factor covers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = mlp(4, 3, 3), nn.Linear(3, 3).double()
        self.slope = nn.PReLU().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slope(self.body(x)))


def test_the_innermost_name_decides() -> None:
    model = Nested()
    pre = exact(model, LIKELIHOOD, uncovered="identity", damping={"body": 0.5, "body.2": 0.25})
    assert pre.damping == {"body.0": 0.5, "body.2": 0.25, "head": 3e-3}
    with pytest.raises(ValueError, match=r"damping: no covered layer is or is inside 'bod'; there are \['body.0'"):
        pre.damping = {"bod": 0.1}
    with pytest.raises(ValueError, match=r"damping\['head'\]=-1: expected a positive number"):
        pre.damping = {"head": -1}
    with pytest.raises(ValueError, match="damping=inf"):
        pre.damping = math.inf
    with pytest.raises(TypeError, match="damping: expected a number, or a mapping"):
        pre.damping = [0.1]
    assert pre.damping == {"body.0": 0.5, "body.2": 0.25, "head": 3e-3}


@pytest.mark.parametrize("exclude", [("body.0", "slope"), ["slope.weight", "body"]])
def test_excluded_layers_keep_their_gradient(exclude: Any) -> None:
    model, x, y = Nested(), batch(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD, exclude=exclude)  # uncovered="error": what is excluded is no error
    left = ["head"] if "body" in exclude else ["body.2", "head"]
    assert list(pre.coverage().layers) == left
    assert re.search(r"slope.weight +identity \(excluded\)", str(pre.coverage()))
    g = plain(model, LIKELIHOOD, x, y)
    F = ng.kronecker_fisher(model, LIKELIHOOD, x, expectation="exact", uncovered="identity")
    found, U = train_once(model, pre, LIKELIHOOD, x, y), F.inverse(damping=0.1, kind="exact") @ g
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    mine = torch.tensor([any(name.startswith(f"{layer}.") for layer in left) for name in names])
    assert torch.equal(found[~mine], g[~mine]) and mine.sum() == 12 * len(left)
    torch.testing.assert_close(found[mine], U[mine], rtol=1e-9, atol=1e-12)


def test_what_cannot_be_excluded_is_said() -> None:
    model = Nested()
    with pytest.raises(ValueError, match="exclude: 'tail': no layer or trainable parameter has that name; there are"):
        exact(model, LIKELIHOOD, exclude=["tail"])
    with pytest.raises(ValueError, match="exclude: 'head.bias': it is part of the block of 'head'"):
        exact(model, LIKELIHOOD, exclude=["head.bias"])
    with pytest.raises(TypeError, match=r"exclude='head': expected a collection of names, such as \['head'\]"):
        exact(model, LIKELIHOOD, exclude="head")
    with pytest.raises(ValueError, match=r"no factor covers slope\.weight"):
        exact(model, LIKELIHOOD, exclude=["head"])


def test_a_block_is_joint_whatever_the_groups_of_the_inner_optimiser() -> None:
    """Weights decay, biases do not, and both learn at rates of their own: U is that of [W b] together."""
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": biases, "lr": 0.5, "weight_decay": 0.0}, {"params": weights, "lr": 0.25}]
    inner = torch.optim.SGD(groups, weight_decay=0.1)
    pre = exact(model, LIKELIHOOD)
    optimizer = ng.Preconditioned(inner, pre)
    U = damped_solve(fisher(model, LIKELIHOOD, x).to_dense(), 0.1, plain(model, LIKELIHOOD, x, y))
    before = [p.detach().clone() for p in model.parameters()]
    z = model(x)
    pre.observe(z)
    LIKELIHOOD.nll(z, y).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        u = grad_of(U, model, p)
        expected = old - (0.5 * u if p.ndim == 1 else 0.25 * (u + 0.1 * old))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_grafting_keeps_the_length_of_the_gradient(per: Any) -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    g = plain(model, LIKELIHOOD, x, y)
    U = train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    pre = exact(model, LIKELIHOOD, scaling=ng.Grafting(per))
    found = train_once(model, pre, LIKELIHOOD, x, y)
    parts = [slice(0, 15), slice(15, 27)] if per == "layer" else [slice(0, 27)]
    expected = torch.cat([U[part] * g[part].norm() / U[part].norm() for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    ratios = [(g[part].norm() / U[part].norm()).item() for part in parts]
    assert pre.stats["nu"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-10)
    assert found.norm().item() == pytest.approx(g.norm().item(), rel=1e-10)


def test_inside_sgd_a_grafted_step_is_as_long_as_that_of_sgd() -> None:
    """Whatever the damping, the scale of the loss and the learning rate."""
    x, y = batch(), targets(LIKELIHOOD)
    for damping, scale in ((1e-4, 1.0), (10.0, 37.0)):
        steps = []
        for scaling in (None, ng.Grafting()):
            model = mlp(4, 3, 3)
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            if scaling is not None:
                pre = exact(model, LIKELIHOOD, damping=damping, scaling=scaling)
                optimizer = ng.Preconditioned(optimizer, pre)
                pre.update(x)
            (scale * LIKELIHOOD.nll(model(x), y)).backward()
            optimizer.step()
            steps.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
        for part in (slice(0, 15), slice(15, 27)):
            torch.testing.assert_close(steps[0][part].norm(), steps[1][part].norm(), rtol=1e-10, atol=0)
        assert (torch.cosine_similarity(*steps, dim=0) > 0.999) == (damping > 1)  # much damping: no turn is left


def test_grafting_a_gradient_of_zero() -> None:
    model, x = mlp(4, 3, 3), batch()
    pre = exact(model, LIKELIHOOD, scaling=ng.Grafting())
    pre.update(x)
    (0 * model(x).sum()).backward()
    pre.step()
    assert torch.equal(gradient(model), torch.zeros(27, dtype=torch.float64)) and pre.stats["nu"] == 1
    with pytest.raises(ValueError, match=r"Grafting\(per='row'\): expected one of 'layer', 'model'"):
        ng.Grafting("row")


@pytest.mark.parametrize("scaling", [None, ng.KLClip(), ng.Grafting(), ng.Grafting("model")], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stay_as_they_are_and_are_counted(scaling: Any, bad: float) -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD, scaling=scaling)
    good = train_once(model, pre, LIKELIHOOD, x, y)
    assert pre.stats["nonfinite"] == 0
    model.zero_grad()
    pre.update(x)
    LIKELIHOOD.nll(model(x), y).backward()
    model[2].bias.grad[1] = bad
    before = gradient(model)
    pre.step()
    torch.testing.assert_close(gradient(model), before, rtol=0, atol=0, equal_nan=True)
    assert pre.stats["nonfinite"] == 1 and pre.stats["skipped"] == 0
    torch.testing.assert_close(train_once(model, pre, LIKELIHOOD, x, y), good, rtol=1e-9, atol=1e-12)
    assert pre.state_dict()["nonfinite"] == 1
