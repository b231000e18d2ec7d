"""Calls that cannot mean what was meant: said by name, and training goes on as if they had not been made."""

from typing import Any

import pytest
import torch
from oracles.preconditioning import batch, exact, gradient, mlp, targets, train_once
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad as ng

LIKELIHOOD = ng.Categorical()


def undisturbed(model: nn.Module, pre: ng.Preconditioner, x: Tensor) -> None:
    """The next step is that of a preconditioner to which nothing happened."""
    y = targets(LIKELIHOOD)
    found = train_once(model, pre, LIKELIHOOD, x, y)
    expected = train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_observe_forgotten_at_first_is_an_error_and_later_a_warning() -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD)
    LIKELIHOOD.nll(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"no curvature yet: call observe\(z\) before loss\.backward\(\), or update"):
        pre.step()
    undisturbed(model, pre, x)
    with pytest.warns(UserWarning, match=r"step 2 wants statistics and nothing was observed: call observe\(z\) or"):
        pre.step()
    pre.step()  # said once
    assert pre.stats["missed"] == 2 and pre.stats["steps"] == 3
    sparse = exact(model, LIKELIHOOD, periods=ng.Renewal(inverses=5, statistics=5, early=(1,)))
    train_once(model, sparse, LIKELIHOOD, x, y)
    sparse.step()  # nothing was due
    assert sparse.stats["missed"] == 0


def test_observe_called_twice() -> None:
    model, x = mlp(4, 3, 3), batch()
    pre = exact(model, LIKELIHOOD)
    z = model(x)
    pre.observe(z)
    with pytest.raises(RuntimeError, match=r"Call observe\(z\) once, with the output of model\(x\)"):
        pre.observe(z)
    pre.skip()
    undisturbed(model, pre, x)


class Exits(nn.Module):
    """A hidden layer, the output, and a head of its own for something else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.side = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return h, self.head(h), self.side(h)


def test_a_z_in_the_middle_of_the_model() -> None:
    """Layers behind it would silently have no curvature; a head beside it has none by right."""
    model, x = Exits(), batch()
    pre = exact(model, LIKELIHOOD)
    with pytest.raises(ValueError, match="z is not the output of the model: layer 'head' was applied to what was"):
        pre.observe(model(x)[0])
    pre.observe(model(x)[1])
    A = pre._pending._sum.layers
    assert A["body"].G.abs().sum() > 0 and A["head"].G.abs().sum() > 0 and A["side"].G.abs().sum() == 0


def test_a_z_of_another_pass() -> None:
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD)
    old = model(x)
    train_once(model, pre, LIKELIHOOD, x, y)
    for z in (old, mlp(4, 3, 3)(x), model[2](torch.ones(2, 3, dtype=x.dtype)), torch.ones(2, 3).requires_grad_()):
        with pytest.raises(RuntimeError, match="z does not come from a forward pass that was recorded since the last"):
            pre.observe(z)
    with torch.no_grad():
        z = model(x)
    with pytest.raises(ValueError, match="z has no graph"):
        pre.observe(z)
    undisturbed(model, pre, x)


def test_a_step_without_gradients() -> None:
    model, x = mlp(4, 3, 3), batch()
    for wrapped in (False, True):
        pre = exact(model, LIKELIHOOD)
        optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.1), pre) if wrapped else pre
        pre.observe(model(x))
        with pytest.raises(RuntimeError, match=r"no covered parameter has a gradient: call loss\.backward\(\)"):
            optimizer.step()
        assert pre.state_dict()["steps"] == 0 and not pre._running.factors
        pre.skip()
        undisturbed(model, pre, x)
        model.zero_grad()


def added(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3).double())


def replaced(model: nn.Sequential) -> None:
    model[2] = nn.Linear(3, 3).double()


def removed(model: nn.Sequential) -> None:
    del model[2]


def assigned(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def computed(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[2])


@pytest.mark.parametrize("expectation", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("likelihood", [LIKELIHOOD, ng.Gaussian()], ids=lambda likelihood: type(likelihood).__name__)
def test_negative_weights_have_no_curvature(expectation: str, likelihood: Any) -> None:
    """Of a weighted loss's gradients there is a second moment all the same."""
    model, x = mlp(4, 3, 3), batch()
    y, weight = targets(likelihood), torch.ones(len(x), dtype=torch.float64)
    weight[2] = -0.5
    pre = ng.Preconditioner(model, likelihood, expectation=expectation)
    if expectation == "empirical":
        pre.update(x, y, weight=weight)
        return
    with pytest.raises(ValueError, match=r"weight: holds negative numbers, down to -0\.5.*'empirical'"):
        pre.observe(model(x), y, weight=weight)
    assert not pre._pending


CHANGES = {"added": (added, "3.weight"), "replaced": (replaced, "2.weight"), "removed": (removed, "2.weight")}
CHANGES |= {"assigned": (assigned, "0.weight"), "computed": (computed, r"2.parametrizations.weight")}


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_are_others_than_at_construction(name: str, update: bool) -> None:
    change, parameter = CHANGES[name]
    model, x = mlp(4, 3, 3), batch()
    pre = exact(model, LIKELIHOOD)
    change(model)
    with pytest.raises(ValueError, match=rf"{parameter}.*: this parameter was added, replaced or removed.*make a new"):
        pre.update(x) if update else pre.observe(model(x))


@pytest.mark.parametrize("update", [False, True])
def test_a_likelihood_that_does_not_fit_z(update: bool) -> None:
    def refused(model: nn.Module, likelihood: Any, message: str) -> None:
        pre, x = exact(model, likelihood), batch()
        with pytest.raises(ValueError, match=message):
            pre.update(x) if update else pre.observe(model(x))
        assert not pre._pending

    flat = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()  # [batch] is no vector of classes
    refused(flat, LIKELIHOOD, r"z: Categorical expects \[batch, ..., classes\], got shape \(12,\)")
    refused(mlp(4, 3), ng.Categorical(class_dim=2), r"z: shape \(12, 3\) has no class dimension 2")
    model, x, y = mlp(4, 3), batch(), targets(LIKELIHOOD)
    pre = exact(model, ng.Categorical(class_weight=torch.ones(4)))
    with pytest.raises(ValueError, match=r"class_weight: expected shape \(3,\)"):
        pre.update(x, y) if update else pre.observe(model(x), y)


def test_an_input_changed_in_place_after_the_forward_pass() -> None:
    model, x = mlp(4, 3, 3), batch()
    for expectation in ("exact", "empirical"):
        pre = exact(model, LIKELIHOOD, expectation=expectation)
        z = model(x)
        x += 1
        with pytest.raises(RuntimeError, match="layer '0' was changed in place"):
            pre.observe(z, targets(LIKELIHOOD))
        x -= 1
        pre.skip()


def test_transforms_of_torch_func() -> None:
    """A transform's tensors have no graph that hooks could see: neither right nor wrong, but refused."""
    model, x, y = mlp(4, 3, 3), batch(), targets(LIKELIHOOD)
    pre = exact(model, LIKELIHOOD)
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        z = torch.func.functional_call(model, parameters, (x,))
        pre.observe(z)
        return LIKELIHOOD.nll(z, y)

    for transformed in (
        lambda: torch.func.grad(loss)(parameters, x),
        lambda: torch.func.vjp(loss, parameters, x),
        lambda: torch.func.vmap(lambda one: (pre.observe(model(one)), one)[1])(x[:, None]),
        lambda: torch.func.vmap(lambda one: (pre.update(one), one)[1])(x[:, None]),
    ):
        with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func.*call update\(x\) outside of it"):
            transformed()
    found = torch.func.grad(lambda p: LIKELIHOOD.nll(torch.func.functional_call(model, p, (x,)), y))(parameters)
    pre.update(x)  # the recipe: gradients by the transform, statistics by update
    for name, p in model.named_parameters():
        p.grad = found[name].clone()
    pre.step()
    ours = gradient(model)
    torch.testing.assert_close(ours, train_once(model, exact(model, LIKELIHOOD), LIKELIHOOD, x, y))


def test_what_is_not_supported_is_named() -> None:
    bags = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"no factor covers 0\.weight \(EmbeddingBag, which sums embeddings"):
        ng.Preconditioner(bags, LIKELIHOOD)
    inner, x = mlp(4, 3, 3), batch()

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)

    for expectation in ("sampled", "empirical"):
        model = Reentrant()
        pre = ng.Preconditioner(model, LIKELIHOOD, expectation=expectation)
        with pytest.raises(RuntimeError, match=r"inner\.0, inner\.2: called inside.*use_reentrant=False"):
            pre.observe(model(x.clone()), targets(LIKELIHOOD))


def test_a_compiled_forward_names_update() -> None:
    model, x = mlp(4, 3, 3), batch()
    pre = exact(model, LIKELIHOOD)
    with pytest.raises(RuntimeError, match=r"for a compiled model, .*call update\(x\) instead"):
        pre.observe(torch.compile(model, backend="eager")(x))
    torch._dynamo.reset()
    undisturbed(model, pre, x)
