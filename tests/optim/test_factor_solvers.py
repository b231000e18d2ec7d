"""Factors inverted by a warm-started iteration, and as low rank plus a diagonal, in the optimisers."""

import copy
import io
from typing import Any

import pytest
import torch
from oracles.kfac import WHOLE, data, mlp, vector
from oracles.preconditioning import EVERY_STEP, train_once
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import to_dense
from natgrad.curvature.block_inverse import FactoredInverse, LowRankInverse, inverse_of
from natgrad.linalg import LowRank, NewtonSchulz, iterative
from natgrad.linalg.low_rank import DiagonalMinusLowRank
from natgrad.optim.settings import Damping, Periods

WARM = NewtonSchulz(iterations=4, tolerance=1e-9)


def made(solver: Any, **settings: Any) -> tuple[nn.Module, ng.KFAC]:
    model = mlp(9, 8, 3)
    damping = Damping(0.5, ng.FactoredTikhonov(solver=solver))
    return model, ng.KFAC(model, ng.Bernoulli(), damping=damping, periods=Periods(2, (1,)), **settings)


def train(opt: ng.KFAC, first: int, last: int) -> None:
    for k in range(first, last):
        opt.step(*data(ng.Bernoulli(), 9, 3, seed=k))


def test_warm_starts_take_the_path_of_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors move little between two refreshes: most inverses come from the iteration, with the same updates."""
    taken = []
    keep = iterative.warm_inverse

    def counted(*arguments: Any) -> Tensor | None:
        taken.append(keep(*arguments))
        return taken[-1]

    monkeypatch.setattr(iterative, "warm_inverse", counted)
    (model, opt), (twin, plain) = made(WARM, decay=0.99), made(None, decay=0.99)
    train(opt, 0, 30)
    train(plain, 0, 30)
    torch.testing.assert_close(vector(model), vector(twin), rtol=1e-6, atol=1e-7)
    used = [found is not None for found in taken]
    assert len(used) == 3 * 15 and sum(used) > 10  # 3 full factors, 15 refreshes after the first


def test_low_rank_of_almost_full_rank_is_nearly_exact() -> None:
    """The damped inverse with rank 4 of 9 inputs, whose factor has three strong directions."""
    model = mlp(9, 3)
    x = data(ng.Bernoulli(), 9, 3)[0] * torch.tensor([5.0, 5, 5, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]).double()
    k = ng.kronecker_fisher(model, ng.Bernoulli(), x)
    exact = k.inverse(0.05).to_dense()
    solver = LowRank(4, steps=4)
    inverse = k.inverse(0.05, kind=ng.FactoredTikhonov(solver=solver))
    torch.testing.assert_close(inverse.to_dense(), exact, rtol=1e-3, atol=3e-4)
    v = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(inverse @ v, inverse.to_dense() @ v)
    worse = k.inverse(0.05, kind=ng.FactoredTikhonov(solver=LowRank(1, steps=4))).to_dense()
    assert (worse - exact).norm() > 10 * (inverse.to_dense() - exact).norm()


def test_the_update_uses_the_low_rank_inverse() -> None:
    model, opt = made(LowRank(3), rescaling=WHOLE)
    x, y = data(ng.Bernoulli(), 9, 3)
    start = vector(model)
    gradient = torch.autograd.grad(ng.Bernoulli().nll(model(x), y), list(model.parameters()))
    opt.step(x, y)
    proposal = []
    for index, name in enumerate(("0", "2")):
        kept = opt.proposals.inverses.get(name, 0.0)
        assert isinstance(kept.A, DiagonalMinusLowRank) and kept.A.W.shape == ((10, 3) if name == "0" else (9, 3))
        factors = opt._running.factors[name]
        of_a, of_g = ng.FactoredTikhonov().split(to_dense(factors.A), to_dense(factors.G), 16 * 0.5)
        V = torch.cat([gradient[2 * index], gradient[2 * index + 1][:, None]], dim=1)
        left = kept.G.to_dense() if isinstance(kept.G, DiagonalMinusLowRank) else torch.diag(kept.G)
        if name == "2":  # the known output factor stays a diagonal
            torch.testing.assert_close(left, torch.linalg.inv(to_dense(factors.G) + of_g * torch.eye(3).double()))
        exact = torch.linalg.inv(to_dense(factors.A) + of_a * torch.eye(len(factors.A)).double())
        assert (kept.A.to_dense() - exact).norm() < 0.3 * exact.norm()
        U = left @ V @ kept.A.to_dense()
        proposal += [U[:, :-1].reshape(-1), U[:, -1]]
    Delta = -torch.cat(proposal)
    torch.testing.assert_close(vector(model) - start, opt.stats["alpha"] * Delta)


@pytest.mark.parametrize("solver", [WARM, LowRank(3), LowRank(4), LowRank(100)], ids=repr)
def test_resuming_is_bit_for_bit(solver: Any) -> None:
    (model, opt), (other_model, other) = made(solver), made(solver)
    template = other.state_dict()
    train(opt, 0, 5)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for key, saved in state["state"].items():
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in template["state"][key].items()}
    other.load_state_dict(state)
    other_model.load_state_dict(copy.deepcopy(model.state_dict()))
    train(opt, 5, 10)
    train(other, 5, 10)
    assert torch.equal(vector(model), vector(other_model))
    _, plain = made(None)
    if isinstance(solver, LowRank) and solver.rank < 5:
        with pytest.raises(ValueError, match="other settings, such as form= of damping"):
            plain.load_state_dict(state)


@pytest.mark.parametrize("solver", [WARM, LowRank(3)], ids=repr)
def test_preconditioner(solver: Any) -> None:
    model = mlp(9, 8, 3)
    form = ng.FactoredTikhonov(solver=solver)
    pre = ng.Preconditioner(model, ng.Bernoulli(), form=form, damping=0.5, periods=EVERY_STEP, scaling=None)
    for k in range(4):
        x, y = data(ng.Bernoulli(), 9, 3, seed=k)
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(ng.Bernoulli().nll(model(x), y), list(model.parameters()))]
        )
        found = train_once(model, pre, ng.Bernoulli(), x, y)
        assert found.isfinite().all() and found @ gradient > 0
    again = ng.Preconditioner(model, ng.Bernoulli(), form=form, damping=0.5, periods=EVERY_STEP, scaling=None)
    again.load_state_dict(copy.deepcopy(pre.state_dict()))
    for one, two in zip(*(_inverses(p) for p in (pre, again)), strict=True):
        assert torch.equal(one, two)


def _inverses(pre: ng.Preconditioner) -> list[Tensor]:
    return [pre._inverses.get(name, 0.5).to_dense() for name in pre.coverage().layers]


def test_a_nan_batch_keeps_the_inverse() -> None:
    for solver in (WARM, LowRank(3)):
        model, opt = made(solver)
        train(opt, 0, 3)
        x, y = data(ng.Bernoulli(), 9, 3)
        opt.step(x * torch.nan, y)
        assert opt.stats["skipped"] == 1
        train(opt, 3, 6)
        assert vector(model).isfinite().all() and opt.stats["failed_inverses"] == 0


def test_what_is_refused() -> None:
    x = data(ng.Bernoulli(), 9, 3)[0]
    chain = ng.kronecker_fisher(mlp(9, 8, 3), ng.Bernoulli(), x, structure="block_tridiagonal")
    with pytest.raises(ValueError, match="a solver is for structure 'block_diagonal'"):
        chain.inverse(0.1, kind=ng.FactoredTikhonov(solver=WARM))
    with pytest.raises(TypeError, match="solver='svd'"):
        ng.FactoredTikhonov(solver="svd")
    with pytest.raises(ValueError, match="ExactTikhonov"):
        ng.KFAC(mlp(3, 2), ng.Bernoulli(), structure="ekfac", damping=Damping(form=ng.FactoredTikhonov(solver=WARM)))


@pytest.mark.parametrize("G", ["low rank", "dense", "diagonal"])
@pytest.mark.parametrize("A", ["low rank", "dense"])
def test_minus_the_product_is_written_to_a_buffer(A: str, G: str) -> None:
    def factor(kind: str, size: int) -> Tensor | DiagonalMinusLowRank:
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(size, size, generator=generator, dtype=torch.float64)
        if kind == "low rank":
            return DiagonalMinusLowRank(x[0].exp(), x[:, :2])
        return x[0].exp() if kind == "diagonal" else x @ x.T

    inverse = inverse_of(factor(A, 5), factor(G, 4), torch.ones((), dtype=torch.bool))
    V, into = torch.randn(4, 5, dtype=torch.float64), torch.full((4, 5), torch.nan, dtype=torch.float64)
    before = V.clone()
    inverse.write_negative(V, into)
    dense = inverse.to_dense() @ V.T.flatten()
    torch.testing.assert_close(into.T.flatten(), -dense)
    assert torch.equal(V, before)


def test_only_wide_layers_take_low_rank_by_default() -> None:
    model = nn.Sequential(nn.Linear(260, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 256)).double()
    opt = ng.KFAC(model, ng.Gaussian())
    assert opt.damping.form == ng.FactoredTikhonov(solver=LowRank(128))
    opt.step(torch.randn(20, 260, dtype=torch.float64), torch.randn(20, 256, dtype=torch.float64))
    wide, narrow, last = (opt.proposals.inverses.at(name, 1.0) for name in ("0", "2", "4"))
    assert (
        isinstance(wide, LowRankInverse) and isinstance(wide.A, DiagonalMinusLowRank) and wide.A.W.shape == (261, 128)
    )
    assert isinstance(narrow, FactoredInverse) and isinstance(last, FactoredInverse) and last.G.ndim == 1
    plain = ng.FactoredTikhonov()
    tridiagonal = ng.KFAC(model, ng.Gaussian(), structure="block_tridiagonal").damping.form
    assert tridiagonal == ng.FactoredTikhonov(solver=LowRank(192))
    assert ng.KFAC(model, ng.Gaussian(), damping=Damping(form=plain)).damping.form == plain
    assert ng.KFAC.paper(model, ng.Gaussian()).damping.form == plain
