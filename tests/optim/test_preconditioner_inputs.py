"""Preconditioner(structure="input_covariance") against the dense inverse, and against ACP."""

import copy
import io

import pytest
import torch
from oracles.preconditioning import EVERY_STEP, batch, gradient, mlp, plain, targets

import natgrad as ng
from natgrad.damping import ExactTikhonov, FactoredTikhonov

GAUSSIAN = ng.Gaussian()


def make(model: torch.nn.Module, **settings) -> ng.Preconditioner:
    given = {"structure": "input_covariance", "scaling": None, "periods": EVERY_STEP, "damping": 0.2, "alpha": 0.7}
    return ng.Preconditioner(model, GAUSSIAN, **given | settings)


@pytest.mark.parametrize("how", ["observe", "update", "micro-batches"])
def test_the_gradient_equals_the_dense_inverse(how: str) -> None:
    model, x, y = mlp(4, 5, 3), batch() + 1, targets(GAUSSIAN)
    pre = make(model)
    z = model(x)
    if how == "observe":
        pre.observe(z)
    elif how == "update":
        pre.update(x)
    else:
        pre.update(x[:5])
        pre.update(x[5:])
    GAUSSIAN.nll(z, y).backward()
    g = gradient(model)
    pre.step()
    F = ng.kronecker_fisher(model, GAUSSIAN, x, structure="input_covariance", alpha=0.7).to_dense()
    expected = torch.linalg.solve(F + 0.2 * torch.eye(len(F), dtype=F.dtype), g)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-11)


def test_with_sgd_it_is_acp_with_a_fixed_alpha() -> None:
    model, x, y = mlp(4, 5, 3), batch() + 1, targets(GAUSSIAN)
    twin = copy.deepcopy(model)
    pre, sgd = make(model), torch.optim.SGD(model.parameters(), lr=0.3)
    z = model(x)
    pre.observe(z)
    GAUSSIAN.nll(z, y).backward()
    pre.step()
    sgd.step()
    ng.ACP(twin, GAUSSIAN, lr=0.3, alpha=0.7, damping=0.2).step(x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_averages_and_state_continue() -> None:
    models = [mlp(4, 5, 3), mlp(4, 5, 3)]
    pres = [make(m, periods=ng.Renewal(inverses=2, statistics=2)) for m in models]
    y = targets(GAUSSIAN)

    def steps(k: int, seeds: range) -> None:
        for seed in seeds:
            models[k].zero_grad()
            z = models[k](batch(seed=seed))
            pres[k].observe(z)
            GAUSSIAN.nll(z, y).backward()
            pres[k].step()

    steps(0, range(5))
    file = io.BytesIO()
    torch.save(pres[0].state_dict(), file)
    file.seek(0)
    pres[1].load_state_dict(torch.load(file, weights_only=True))
    for k in (0, 1):
        steps(k, range(5, 9))
    assert torch.equal(gradient(models[0]), gradient(models[1]))
    assert (gradient(models[0]) - plain(models[0], GAUSSIAN, batch(seed=8), y)).norm() > 0.1


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha=0.0: expected a positive number"):
        make(mlp(4, 3), alpha=0.0)
    with pytest.raises(ValueError, match="structure='input_covariance' has ExactTikhonov"):
        make(mlp(4, 3), form=FactoredTikhonov())
    make(mlp(4, 3), form=ExactTikhonov())
