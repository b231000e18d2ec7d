"""K-FAC with the block-tridiagonal inverse against a dense reconstruction, in float64; its state; what it refuses."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.kfac import FIXED, NO_UPDATE, data, dense_update, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.pairs import pair_key
from natgrad.damping import ExactTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.settings import Damping, Periods

TRIDIAGONAL = "block_tridiagonal"
LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


def dense_proposal(opt: ng.KFAC, model: nn.Module, gradient: Tensor, damping: float) -> Tensor:
    """−F̂^{-1} ∇h for a model of linear layers in order: Σ inverses of pairs − Σ inverses of inner blocks."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    factors, gamma = opt._running.factors, math.sqrt(damping)
    F: dict[tuple[int, int], Tensor] = {}
    for i, name in enumerate(names):
        A, G = factors[name].A, factors[name].G
        pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
        A, G = (M + c * torch.eye(len(M), dtype=M.dtype) for M, c in ((A, pi * gamma), (G, gamma / pi)))
        F[i, i] = torch.kron(A, G)
        if i:
            cross = factors[pair_key(names[i - 1], name)]
            F[i - 1, i] = torch.kron(cross.A, cross.G)
    sizes = [len(F[i, i]) for i in range(len(names))]
    start = [sum(sizes[:i]) for i in range(len(names) + 1)]
    P = torch.zeros(start[-1], start[-1], dtype=torch.float64)
    for i in range(len(names) - 1):
        pair = torch.cat([torch.cat([F[i, i], F[i, i + 1]], 1), torch.cat([F[i, i + 1].T, F[i + 1, i + 1]], 1)])
        P[start[i] : start[i + 2], start[i] : start[i + 2]] += torch.linalg.inv(pair)
    for i in range(1, len(names) - 1):
        P[start[i] : start[i + 1], start[i] : start[i + 1]] -= torch.linalg.inv(F[i, i])
    order, offset = [], 0
    for name in names:
        out, columns = model.get_submodule(name).weight.shape
        W = torch.arange(offset, offset + out * columns).view(out, columns)
        offset += out * (columns + 1)
        order.append(torch.cat([W.T.reshape(-1), torch.arange(offset - out, offset)]))
    index = torch.cat(order)
    result = torch.zeros_like(gradient)
    result[index] = -P @ gradient[index]
    return result


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("l2", [0.0, 0.05])
@pytest.mark.parametrize("widths", [(4, 3, 3), (3, 5, 2, 4, 3)], ids=str)
def test_three_updates_equal_the_dense_reconstruction(likelihood: Any, l2: float, widths: tuple[int, ...]) -> None:
    model = mlp(*widths)
    x, y = data(likelihood, widths[0], widths[-1])
    damping = Damping(0.3, rule=LevenbergMarquardt(every=1, decay=0.9), ratio=1.5)
    opt = ng.KFAC(model, likelihood, structure=TRIDIAGONAL, damping=damping, l2=l2, **FIXED)
    previous, lam = torch.zeros_like(vector(model)), 0.3
    for _ in range(3):
        before, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
        F = ng.Fisher(model, likelihood, x).to_dense()
        opt.step(x, y)
        delta = vector(model) - before
        proposal = dense_proposal(opt, model, gradient, 2.25 * (lam + l2))
        expected = dense_update(F, lam + l2, gradient, proposal, previous)
        torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)
        lam, previous = opt.stats["lambda"], delta
    assert opt.stats["failed_inverses"] == 0


def test_few_rows_take_the_low_rank_form_to_the_same_update() -> None:
    likelihood, model = ng.Bernoulli(), mlp(9, 7, 8)
    x, y = data(likelihood, 9, 8, n=3)
    damping = Damping(0.5, rule=None, ratio=1.0)
    opt = ng.KFAC(model, likelihood, structure=TRIDIAGONAL, damping=damping, l2=0.1, **FIXED)
    assert opt.proposals.wants_rows(3)
    before, gradient = vector(model), gradient_of(model, likelihood, x, y, 0.1)
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt.step(x, y)
    expected = dense_update(F, 0.6, gradient, dense_proposal(opt, model, gradient, 0.6))
    torch.testing.assert_close(vector(model) - before, expected, rtol=1e-8, atol=1e-10)


def test_paper_constants_with_the_tridiagonal_inverse() -> None:
    likelihood, model = ng.Bernoulli(), mlp(4, 5, 3, 4)
    x, y = data(likelihood, 4, 4, n=1)
    opt = ng.KFAC.paper(model, likelihood, structure=TRIDIAGONAL)
    before, gradient = vector(model), gradient_of(model, likelihood, x, y, 1e-5)
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt.step(x, y)
    proposal = dense_proposal(opt, model, gradient, 150.0 + 1e-5)
    expected = dense_update(F, 150.0 + 1e-5, gradient, proposal)
    torch.testing.assert_close(vector(model) - before, expected, rtol=1e-8, atol=1e-12)
    for k in range(40):
        opt.step(*data(likelihood, 4, 4, seed=k))
    assert opt.stats["gamma"] != math.sqrt(150.0 + 1e-5)  # the γ rule has acted, at updates 20 and 40


def test_gamma_rule_compares_tridiagonal_inverses() -> None:
    likelihood, model, lam, l2 = ng.Bernoulli(), mlp(5, 4, 3, 3), 0.5, 0.02
    x, y = data(likelihood, 5, 3)
    damping = Damping(lam, rule=None, gamma=GreedyGamma(every=2))
    opt = ng.KFAC(model, likelihood, structure=TRIDIAGONAL, damping=damping, l2=l2, **FIXED)
    start = vector(model)
    opt.step(x, y)
    before, gradient = vector(model), gradient_of(model, likelihood, x, y, l2)
    F = ng.Fisher(model, likelihood, x).to_dense()
    opt.step(x, y)
    values, updates = {}, {}
    gamma0, omega = math.sqrt(lam + l2), 0.95
    for gamma in (gamma0, gamma0 * omega, gamma0 / omega):
        proposal = dense_proposal(opt, model, gradient, gamma**2)
        updates[gamma] = d = dense_update(F, lam + l2, gradient, proposal, before - start)
        values[gamma] = float(gradient @ d + 0.5 * d @ (F @ d + (lam + l2) * d))
    best = min(values, key=values.__getitem__)
    assert opt.stats["gamma"] == pytest.approx(best, rel=1e-9)
    torch.testing.assert_close(vector(model), before + updates[best], rtol=1e-8, atol=1e-10)


def test_averages_of_cross_factors_keep_pace_with_those_of_the_layers() -> None:
    """Same weights: the joint second moment of neighbours stays positive semi-definite, micro-batches or not."""
    likelihood, model = ng.Categorical(), mlp(4, 5, 3)
    opt = ng.KFAC(model, likelihood, structure=TRIDIAGONAL, guard=NO_UPDATE)
    average: Tensor | float = 0.0
    for k in range(1, 6):
        x, y = data(likelihood, 4, 3, seed=k)
        opt.step(x, y, micro_batch_size=5 if k % 2 else None)
        h = torch.tanh(model[0](x)).detach()
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        moment = torch.cat([x, ones], 1).T @ torch.cat([h, ones], 1) / len(x)
        average = (1 - 1 / k) * average + moment / k
        broken = x.clone()
        broken[0, 0] = math.nan
        opt.step(broken, y)  # leaves no trace in any of them
    torch.testing.assert_close(opt._running.factors["0→2"].A, average)
    for which in ("A", "G"):
        lower, cross, upper = (getattr(opt._running.factors[key], which) for key in ("0", "0→2", "2"))
        joint = torch.cat([torch.cat([lower, cross], 1), torch.cat([cross.T, upper], 1)])
        assert torch.linalg.eigvalsh(joint)[0] > -1e-12


def test_a_failed_decomposition_keeps_the_whole_inverse() -> None:
    likelihood, model = ng.Bernoulli(), mlp(4, 3, 3, 3)
    x, y = data(likelihood, 4, 3)
    opt = ng.KFAC(model, likelihood, structure=TRIDIAGONAL, damping=0.3, guard=NO_UPDATE)
    opt.step(x, y)
    inverses = opt.proposals.inverses
    kept, edges = dict(inverses._kept), dict(inverses._edges)
    opt._running.factors["2→4"].G[0, 0] = math.nan
    opt.proposals.refresh(opt._gamma**2)
    assert inverses.failures == 1 and inverses._kept == kept and inverses._edges == edges
    opt.step(x, y)
    assert opt.stats["failed_inverses"] == 2 and torch.isfinite(vector(model)).all()


class _Shuffled(nn.Module):
    """Layers registered in another order than they are used, a parameter without factors, no plain chain."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(4))
        self.first, self.middle = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(nn.functional.gelu(self.first(x)))) * self.scale)


def _batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(16, 5, generator=generator), torch.rand(16, 3, generator=generator)


def _model(shuffled: bool) -> nn.Module:
    torch.manual_seed(0)
    return _Shuffled() if shuffled else nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def _optimizer(model: nn.Module, **settings: Any) -> ng.KFAC:
    damping = Damping(gamma=GreedyGamma(every=4))
    given = {"damping": damping, "uncovered": "diagonal", "periods": Periods(4, (1, 2)), "structure": TRIDIAGONAL}
    return ng.KFAC(model, ng.Bernoulli(), l2=1e-3, seed=3, **{**given, **settings})


def _train(opt: ng.KFAC, first: int, last: int) -> list[float]:
    return [opt.step(*_batch(k)).item() for k in range(first, last)]


@pytest.mark.parametrize("rank", [None, 2], ids=["whole", "rank 2"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("at", [0, 6])
def test_resuming_equals_an_uninterrupted_run(shuffled: bool, at: int, rank: int | None) -> None:
    model = _model(shuffled)
    form = ng.FactoredTikhonov(solver=None if rank is None else ng.linalg.LowRank(rank))
    damping = Damping(form=form, gamma=GreedyGamma(every=4))
    opt = _optimizer(model, damping=damping)
    _train(opt, 0, at)
    weights, buffer = copy.deepcopy(model.state_dict()), io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    losses = _train(opt, at, at + 9)
    again = _model(shuffled)
    again.load_state_dict(weights)
    resumed = _optimizer(again, damping=damping)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert _train(resumed, at, at + 9) == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    names = ("first", "middle", "last") if shuffled else ("0", "2")
    assert resumed.proposals.inverses.names == names and dict(resumed.stats) == dict(opt.stats)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed_checkpoint_round_trip(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = _model(False)
    opt = _optimizer(model)
    _train(opt, 0, 6)
    weights = copy.deepcopy(model.state_dict())
    dcp.save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path / "checkpoint")
    losses = _train(opt, 6, 10)
    again = _model(False)
    again.load_state_dict(weights)
    resumed = _optimizer(again)
    state = {"optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_optimizer_state_dict(again, resumed, state["optimizer"])
    assert _train(resumed, 6, 10) == losses


def test_states_of_other_structures_are_refused() -> None:
    tri, diagonal = _optimizer(_model(False)), _optimizer(_model(False), structure="block_diagonal")
    _train(tri, 0, 2)
    _train(diagonal, 0, 2)
    before = vector(tri.view.module)
    with pytest.raises(ValueError, match="order is None; expected a permutation of the 2 layers"):
        tri.load_state_dict(diagonal.state_dict())
    with pytest.raises(ValueError, match="unknown.*edge_A_X"):
        diagonal.load_state_dict(tri.state_dict())
    state = tri.state_dict()
    state["param_groups"][0]["order"] = torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"order is tensor\(\[0, 0\]\)"):
        tri.load_state_dict(state)
    assert torch.equal(vector(tri.view.module), before)
    _train(tri, 2, 4)


def test_what_does_not_go_together_is_refused() -> None:
    model, likelihood = mlp(4, 3, 2), ng.Gaussian()
    x, y = data(likelihood, 4, 2)
    with pytest.raises(ValueError, match="static_inputs.*leave static_inputs out"):
        ng.KFAC(model, likelihood, structure=TRIDIAGONAL, static_inputs=x)
    with pytest.raises(ValueError, match="FactoredTikhonov"):
        ng.KFAC(model, likelihood, structure=TRIDIAGONAL, damping=Damping(form=ExactTikhonov()))
    with pytest.raises(ValueError, match="by Cholesky or as LowRank"):
        form = ng.FactoredTikhonov(solver=ng.linalg.NewtonSchulz())
        ng.KFAC(model, likelihood, structure=TRIDIAGONAL, damping=Damping(form=form))
    with pytest.raises(ValueError, match="KFAC knows 'block_diagonal', 'block_tridiagonal'"):
        ng.KFAC(model, likelihood, structure="tridiagonal")

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.c(a + torch.tanh(self.b(a)))

    opt = ng.KFAC(Skip(), likelihood, structure=TRIDIAGONAL)
    with pytest.raises(ValueError, match="chain of layers.*layer 'c' takes the outputs of 'a' and 'b'.*block_diagonal"):
        opt.step(torch.ones(4, 2), torch.ones(4, 2))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("make", [ng.KFAC, ng.KFAC.paper])
def test_it_trains_in_single_precision(make: Any, shuffled: bool) -> None:
    model = _model(shuffled)
    rules = {"rule": LevenbergMarquardt(), "gamma": GreedyGamma()} if make is not ng.KFAC else {}
    opt = make(model, ng.Bernoulli(), structure=TRIDIAGONAL, uncovered="identity", damping=Damping(0.3, **rules))
    x, _ = _batch(0)
    y = (x[:, :3] > 0).float()
    losses = [opt.step(x, y).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    assert opt.stats["failed_inverses"] == 0 and opt.proposals.inverses.clipped == 0
