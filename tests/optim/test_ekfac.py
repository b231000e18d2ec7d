"""`structure="ekfac"` in KFAC and Preconditioner: second moments that follow the statistics, against dense twins."""

import copy
import io
from typing import Any

import pytest
import torch
from oracles.kfac import EVERY_ROW, FIXED, data, gradient_of, mlp, vector
from oracles.preconditioning import batch, exact, train_once
from oracles.preconditioning import targets as some_targets
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import to_dense
from natgrad.curvature.inverse import kronecker_basis
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.damping_rules import GreedyGamma, LevenbergMarquardt
from natgrad.optim.settings import Damping, Periods, StepGuard

LIKELIHOODS = [ng.Gaussian(variance=0.7), ng.Bernoulli(normalizer="element"), ng.Categorical(normalizer="none")]


class Twin:
    """S of every layer, by dense matrices: averaged with ε, the diagonal of what it stood for when Q changes."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay, self.k = decay, 0
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.matrices: dict[str, Tensor] = {}  # Q diag(S) Qᵀ
        self.bases: dict[str, Tensor] = {}

    def observe(self, estimate: Any, blocks: dict[str, Tensor]) -> None:
        self.k += 1
        keep = min(1 - 1 / self.k, self.decay)
        for name, new in estimate.factors.items():
            A, G = to_dense(new.A), to_dense(new.G)
            old_A, old_G = self.factors.get(name, (torch.zeros_like(A), torch.zeros_like(G)))
            self.factors[name] = keep * old_A + (1 - keep) * A, keep * old_G + (1 - keep) * G
            if name in self.bases:
                Q = self.bases[name]
                S = Q.T @ (keep * self.matrices[name] + (1 - keep) * blocks[name]) @ Q
                self.matrices[name] = Q @ torch.diag(S.diagonal()) @ Q.T

    def refresh(self) -> None:
        for name, (A, G) in self.factors.items():
            Q = torch.kron(torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1])
            M = self.matrices.get(name, torch.kron(A, G))
            self.bases[name], self.matrices[name] = Q, Q @ torch.diag((Q.T @ M @ Q).diagonal()) @ Q.T

    def proposal(self, model: nn.Module, gradient: Tensor, damping: float) -> Tensor:
        """``−(Q diag(S) Qᵀ + damping I)^{-1} ∇h`` in the order of the parameters."""
        view = ng.kronecker_fisher(model, ng.Gaussian(), torch.ones(2, 4, dtype=torch.float64)).domain
        found, parts = {}, view.to_dict(gradient)
        for name, M in self.matrices.items():
            V = torch.cat([parts[f"{name}.weight"], parts[f"{name}.bias"][:, None]], dim=1)
            solved = torch.linalg.solve(M + damping * torch.eye(len(M), dtype=M.dtype), V.T.reshape(-1))
            U = -solved.view(V.shape[1], V.shape[0]).T
            found |= {f"{name}.weight": U[:, :-1], f"{name}.bias": U[:, -1]}
        return view.to_vector(found)


def layer_blocks(model: nn.Module, likelihood: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """The exact block of every layer, stacked columns of [W b]."""
    dense = ng.kronecker_fisher(model, likelihood, x, structure="exact_block", **options).to_dense(order="vec")
    blocks, start = {}, 0
    for name, layer in model.named_children():
        size = sum(p.numel() for p in layer.parameters())
        if size:
            blocks[name] = dense[start : start + size, start : start + size]
        start += size
    return blocks


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda lik: type(lik).__name__)
@pytest.mark.parametrize("every", [1, 2])
def test_preconditioner_equals_the_dense_twin(likelihood: Any, every: int) -> None:
    model = mlp(4, 5, 3)
    periods = ng.Renewal(inverses=every, statistics=1, early=(1,))
    pre = exact(model, likelihood, structure="ekfac", periods=periods, form=None)
    twin = Twin()
    for step in range(1, 5):
        x, y = batch(seed=step), some_targets(likelihood)
        twin.observe(
            ng.kronecker_fisher(model, likelihood, x, expectation="exact"),
            layer_blocks(model, likelihood, x, expectation="exact"),
        )
        if step == 1 or step % every == 0:
            twin.refresh()
        expected = twin.proposal(model, gradient_of(model, likelihood, x, y), 0.1)
        found = train_once(model, pre, likelihood, x, y)
        torch.testing.assert_close(found, -expected, rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_kfac_update_equals_the_dense_twin(every: int, l2: float) -> None:
    """The same draws give the twin its second moments; (α, μ) come from the exact F as for every structure."""
    likelihood, model = ng.Categorical(), mlp(4, 5, 3)
    damping = Damping(0.3, rule=LevenbergMarquardt(every=1, decay=0.9), ratio=1.5)
    settings = FIXED | {"periods": Periods(every, early=(1,))}
    opt = ng.KFAC(model, likelihood, structure="ekfac", damping=damping, l2=l2, **settings)
    twin, previous = Twin(), torch.zeros_like(vector(model))
    for step in range(1, 6):
        x, y = data(likelihood, 4, 3, seed=step)
        before, lam = vector(model), 0.3 if step == 1 else opt.stats["lambda"]
        draws = [torch.Generator().set_state(opt._generator.get_state()) for _ in range(2)]
        twin.observe(
            ng.kronecker_fisher(model, likelihood, x, expectation="sampled", generator=draws[0]),
            layer_blocks(model, likelihood, x, expectation="sampled", generator=draws[1]),
        )
        if step == 1 or step % every == 0:
            twin.refresh()
        gradient = gradient_of(model, likelihood, x, y, l2)
        proposal = twin.proposal(model, gradient, 2.25 * (lam + l2))
        H = ng.Fisher(model, likelihood, x).to_dense() + (lam + l2) * torch.eye(len(gradient), dtype=torch.float64)
        D = torch.stack([proposal, previous], 1) if step > 1 else proposal[:, None]
        opt.step(x, y)
        delta = vector(model) - before
        torch.testing.assert_close(delta, D @ torch.linalg.solve(D.T @ H @ D, -D.T @ gradient), rtol=1e-6, atol=1e-9)
        previous = delta
    inverses = opt.proposals.inverses
    for name, M in twin.matrices.items():
        Q = kronecker_basis(inverses.bases[name])
        torch.testing.assert_close(Q @ torch.diag(inverses.scalings[name].T.reshape(-1)) @ Q.T, M)


def test_second_moments_converge_to_the_diagonal_of_the_fisher() -> None:
    likelihood, model = ng.Bernoulli(), mlp(4, 5, 3)
    x, y = data(likelihood, 4, 3)
    settings = {"periods": Periods(10**6, early=(1,)), "subsets": EVERY_ROW, "decay": 0.999}
    guard = StepGuard(threshold=float("inf"), raise_damping=1.0)  # nothing is ever accepted
    opt = ng.KFAC(model, likelihood, structure="ekfac", damping=1.0, guard=guard, **settings)
    for _ in range(400):
        opt.step(x, y)
    F = layer_blocks(model, likelihood, x)
    for name, basis in opt.proposals.inverses.bases.items():
        Q = kronecker_basis(basis)
        exact_S = (Q.T @ F[name] @ Q).diagonal()
        error = (opt.proposals.inverses.scalings[name].T.reshape(-1) - exact_S).norm()
        assert error < 0.1 * exact_S.norm()
        kron_error = (torch.outer(basis.g, basis.a).T.reshape(-1) - exact_S).norm()
        assert name == "2" or error < 0.5 * kron_error
        if name == "2":  # the output layer's F_R is diagonal and known: no sampling, and Q_G = I
            assert basis.QG is None and error < 0.01 * exact_S.norm()


def test_one_undamped_step_on_one_layer_is_newtons() -> None:
    model, likelihood = mlp(4, 2), ng.Gaussian()
    x, y = data(likelihood, 4, 2)
    start, gradient = vector(model), gradient_of(model, likelihood, x, y, 0.0)
    H = ng.Hessian(model, likelihood, x, y).to_dense()
    ng.KFAC(model, likelihood, structure="ekfac", damping=Damping(0.0, rule=None), **FIXED).step(x, y)
    torch.testing.assert_close(vector(model), start - torch.linalg.solve(H, gradient), rtol=1e-6, atol=1e-8)


def _kfac(seed: int = 0, **settings: Any) -> tuple[nn.Module, ng.KFAC]:
    model = mlp(4, 5, 3)
    return model, ng.KFAC(model, ng.Bernoulli(), structure="ekfac", periods=Periods(3, (1,)), seed=seed, **settings)


@pytest.mark.parametrize("gamma", [None, GreedyGamma(every=3)])
def test_kfac_resumes_bit_for_bit(gamma: Any) -> None:
    (model, opt), (other_model, other) = _kfac(damping=Damping(gamma=gamma)), _kfac(5, damping=Damping(gamma=gamma))
    for k in range(4):
        opt.step(*data(ng.Bernoulli(), 4, 3, seed=k))
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    other_model.load_state_dict(copy.deepcopy(model.state_dict()))
    for k in range(4, 9):
        opt.step(*data(ng.Bernoulli(), 4, 3, seed=k))
        other.step(*data(ng.Bernoulli(), 4, 3, seed=k))
        assert torch.equal(vector(model), vector(other_model))


def test_a_new_optimisers_state_is_a_template_and_other_structures_are_refused() -> None:
    _, opt = _kfac()
    template = opt.state_dict()
    opt.step(*data(ng.Bernoulli(), 4, 3))
    state = opt.state_dict()
    for key, saved in state["state"].items():
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in template["state"][key].items()}
    model = mlp(4, 5, 3)
    plain = ng.KFAC(model, ng.Bernoulli(), damping=Damping(form=ExactTikhonov()))
    with pytest.raises(ValueError, match="unknown \\['S'\\].*structure="):
        plain.load_state_dict(state)


def test_preconditioner_resumes_bit_for_bit() -> None:
    def made() -> tuple[nn.Module, ng.Preconditioner]:
        model = mlp(4, 5, 3)
        return model, ng.Preconditioner(model, ng.Bernoulli(), structure="ekfac", periods=ng.Renewal(3, (1,), 2))

    def run(model: nn.Module, pre: ng.Preconditioner, steps: range) -> None:
        for k in steps:
            train_once(model, pre, ng.Bernoulli(), *data(ng.Bernoulli(), 4, 3, seed=k))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.5 * p.grad)

    (model, pre), (other_model, other) = made(), made()
    run(model, pre, range(5))
    other.load_state_dict(copy.deepcopy(pre.state_dict()))
    other_model.load_state_dict(copy.deepcopy(model.state_dict()))
    run(model, pre, range(5, 10))
    run(other_model, other, range(5, 10))
    assert torch.equal(vector(model), vector(other_model))


@pytest.mark.parametrize("first", [True, False])
def test_a_nan_batch_changes_nothing(first: bool) -> None:
    model, opt = _kfac(damping=1.0)
    if not first:
        opt.step(*data(ng.Bernoulli(), 4, 3))
    before = copy.deepcopy(opt.state_dict())
    parameters = vector(model)
    x, y = data(ng.Bernoulli(), 4, 3, seed=2)
    x[0, 0] = torch.nan
    opt.step(x, y)
    assert opt.stats["skipped"] == 1 and torch.equal(vector(model), parameters)
    after = opt.state_dict()
    for key, saved in before["state"].items():
        assert torch.equal(saved["S"], after["state"][key]["S"]) if "S" in saved else True
    for k in range(3, 6):
        opt.step(*data(ng.Bernoulli(), 4, 3, seed=k))
    assert vector(model).isfinite().all() and not torch.equal(vector(model), parameters)
    assert all(S.isfinite().all() for S in opt.proposals.inverses.scalings.values())


def test_second_moments_that_overflow_are_left_out() -> None:
    model, opt = _kfac(damping=1.0)
    opt.step(*data(ng.Bernoulli(), 4, 3))
    inverses = opt.proposals.inverses
    before = {name: S.clone() for name, S in inverses.scalings.items()}
    estimate = {
        name: ng.curvature.base.Factors(torch.eye(2), torch.eye(2), S * torch.inf) for name, S in before.items()
    }
    inverses.average(estimate, torch.tensor(0.5), torch.tensor(True))
    for name, S in inverses.scalings.items():
        assert torch.equal(S, before[name])


def test_what_is_refused() -> None:
    model = mlp(4, 5, 3)
    with pytest.raises(ValueError, match="structure='ekfac' has ExactTikhonov"):
        ng.KFAC(model, ng.Bernoulli(), structure="ekfac", damping=Damping(form=FactoredTikhonov("one")))
    with pytest.raises(ValueError, match="structure='ekfac' has ExactTikhonov"):
        ng.Preconditioner(model, ng.Bernoulli(), structure="ekfac", form=FactoredTikhonov())
    with pytest.raises(ValueError, match="KFAC knows 'block_diagonal', 'block_tridiagonal', 'ekfac'"):
        ng.KFAC(model, ng.Bernoulli(), structure="diagonal")
    assert isinstance(ng.KFAC(model, ng.Bernoulli(), structure="ekfac").damping.form, ExactTikhonov)
    paper = ng.KFAC.paper(model, ng.Bernoulli(), structure="ekfac")
    assert paper.damping == Damping(150.0, ExactTikhonov(), LevenbergMarquardt(), GreedyGamma())
