"""EigenAdam against Adam written out in the dense eigenbases, checkpoints and broken batches."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from oracles.kfac import data, gradient_of, mlp, vector
from torch import nn

import natgrad as ng
from natgrad.curvature.base import Factors, to_dense
from natgrad.linalg.low_rank import leading_subspace
from natgrad.linalg.reflectors import Reflectors
from natgrad.optim.scaling import KLClip
from natgrad.optim.settings import Periods, Subsets

EVERY = Subsets(1.0, 1.0)


def dense_bases(opt: ng.EigenAdam, rank: int | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Q_G and Q_A of every layer from the averaged factors; of a diagonal factor the identity; reflections as such."""
    found = {}
    if rank is not None:
        for name, block in opt._running.factors.items():
            basis, both = opt._bases.basis(name), []
            assert basis is not None
            for Q, M in ((basis.QG, block.G), (basis.QA, block.A)):
                if isinstance(Q, Reflectors):
                    assert len(M) >= 2 * rank
                    Q = Q.to_dense()
                    U, _ = leading_subspace(to_dense(M), rank, 1, Q[:, :rank])
                    assert torch.linalg.matrix_norm(U.T @ Q[:, :rank], 2) > 0.99
                both.append(torch.eye(len(M.vector)).to(block.A) if Q is None else Q)
            found[name] = both[0], both[1]
        return found
    for name, block in opt._running.factors.items():
        A, G = to_dense(block.A), to_dense(block.G)
        diagonal = torch.equal(G, torch.diag(G.diagonal()))
        found[name] = (torch.eye(len(G)).to(G) if diagonal else torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
    return found


def joint(model: nn.Sequential, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[W b]`` of every layer from a vector over the parameters."""
    found, offset = {}, 0
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            out, columns = layer.weight.shape
            W, b = flat[offset : offset + out * columns].view(out, columns), flat[offset + out * columns :][:out]
            found[name], offset = torch.cat([W, b[:, None]], dim=1), offset + out * (columns + 1)
    return found


@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("rank", [None, 2], ids=["whole", "rank 2"])
@pytest.mark.parametrize("rows", [12, 4], ids=["many rows", "fewer rows than columns"])
@pytest.mark.parametrize("likelihood", [ng.Gaussian(), ng.Categorical()], ids=["gaussian", "categorical"])
def test_the_update_is_adams_in_the_eigenbasis(likelihood: Any, rows: int, rank: int | None, nesterov: bool) -> None:
    """m is the rotated mean of all gradients so far; v's entries stay where they are when the basis is renewed.

    With few rows the gradient is rotated by rotating them: on one side of the first layer, and of the second. With a
    rank the bases of the factors of 4 rows and more are reflections.
    """
    model, (x, y) = mlp(5, 4, 3), data(likelihood, 5, 3, n=rows)
    periods = Periods(inverses=3, early=(1,), statistics=1)
    settings: dict[str, Any] = {
        "betas": (0.8, 0.9),
        "eps": 1e-3,
        "warmup": 4,
        "width": 2.0,
        "clip": None,
        "anneal": 3.0,
        "nesterov": nesterov,
    }
    opt = ng.EigenAdam(model, likelihood, lr=0.02, rank=rank, subsets=EVERY, periods=periods, **settings)
    mean: dict[str, torch.Tensor] = {}
    square: dict[str, torch.Tensor] = {}
    for k in range(1, 8):
        before, gradients = joint(model, vector(model)), joint(model, gradient_of(model, likelihood, x, y, 0.0))
        assert opt.step(x, y) == pytest.approx(opt.stats["loss"])
        if k == 1 or k % 3 == 0:
            bases = dense_bases(opt, rank)
        after = joint(model, vector(model))
        for name, (QG, QA) in bases.items():
            mean[name] = 0.8 * mean.get(name, 0.0) + 0.2 * gradients[name]
            square[name] = 0.9 * square.get(name, 0.0) + 0.1 * (QG.T @ gradients[name] @ QA) ** 2
            m = mean[name] / (1 - 0.8**k)
            if nesterov:
                m = (0.8 * mean[name] + 0.2 * gradients[name]) / (1 - 0.8 ** (k + 1))
            m = QG.T @ m @ QA
            step = QG @ (m / ((square[name] / (1 - 0.9**k)).sqrt() + 1e-3)) @ QA.T
            expected = before[name] - 0.02 * math.sqrt(2 / step.shape[1]) * min(k / 4, 1) / math.sqrt(1 + k / 3) * step
            torch.testing.assert_close(after[name], expected, rtol=1e-7, atol=1e-9)
    assert len(bases) == 2 and opt.stats["updates"] == 7 and opt.stats["skipped"] == 0


def test_constant_inputs_are_decomposed_once() -> None:
    """A of the first layer is that of all inputs, whatever the batch; its eigenvectors stay, a new G is found."""
    model, (x, y) = mlp(5, 4, 3), data(ng.Gaussian(), 5, 3, n=20)
    everything = torch.cat([x, 3 * x])
    opt = ng.EigenAdam(model, ng.Gaussian(), periods=Periods(1), subsets=EVERY, static_inputs=everything)
    opt.step(x, y)
    first = opt._bases.basis("0")
    opt.step(x, y)
    second = opt._bases.basis("0")
    assert first is not None and second is not None and second.QA is first.QA and second.QG is not first.QG
    ones = torch.cat([everything, torch.ones(40, 1).to(x)], dim=1)
    A = second.QA @ torch.diag(second.a) @ second.QA.T
    torch.testing.assert_close(A, ones.T @ ones / 40)
    QG, QA = dense_bases(opt)["0"]
    torch.testing.assert_close((second.QA.T @ QA).abs(), torch.eye(6).to(x), atol=1e-8, rtol=0)
    torch.testing.assert_close((second.QG.T @ QG).abs(), torch.eye(4).to(x), atol=1e-8, rtol=0)
    last = opt._bases.basis("2")
    opt.step(x, y)
    again = opt._bases.basis("2")
    assert last is not None and again is not None and again.QA is not last.QA


def test_a_first_batch_that_is_broken_leaves_no_basis_behind() -> None:
    model, (x, y) = mlp(5, 4, 3), data(ng.Gaussian(), 5, 3, n=20)
    twin = copy.deepcopy(model)
    opt = ng.EigenAdam(model, ng.Gaussian(), static_inputs=x, subsets=EVERY)
    opt.step(x * math.nan, y)
    assert not opt._bases and torch.equal(vector(model), vector(twin))
    opt.step(x, y)
    assert opt._bases.basis("0") is not None and opt.stats["skipped"] == 1
    assert not torch.equal(vector(model), vector(twin))


def test_updates_without_statistics_evaluate_no_curvature_rows() -> None:
    model, (x, y) = mlp(5, 4, 3), data(ng.Gaussian(), 5, 3, n=20)
    opt = ng.EigenAdam(model, ng.Gaussian(), periods=Periods(1, statistics=2))
    for _ in range(20):
        opt.step(x, y)
    taken, generator = float(opt._running.updates), opt._generator.get_state()
    opt.step(x, y)  # the 21st
    assert float(opt._running.updates) == taken == 20 and torch.equal(opt._generator.get_state(), generator)
    opt.step(x, y)
    assert float(opt._running.updates) == 21


@pytest.mark.parametrize("radius", [1e-4, 1e4])
def test_an_update_moves_the_distribution_by_the_radius_at_most(radius: float) -> None:
    """½ δᵀ (A ⊗ G) δ, summed over the layers, is the radius where the bound is met; a wide bound changes nothing."""
    likelihood, model = ng.Gaussian(), mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3)
    free = copy.deepcopy(model)
    before = joint(model, vector(model))
    opt = ng.EigenAdam(model, likelihood, lr=0.1, warmup=0, subsets=EVERY, clip=KLClip(radius))
    other = ng.EigenAdam(free, likelihood, lr=0.1, warmup=0, subsets=EVERY, clip=None)
    opt.step(x, y)
    other.step(x, y)
    moved = {name: W - before[name] for name, W in joint(model, vector(model)).items()}
    freely = {name: W - before[name] for name, W in joint(free, vector(free)).items()}
    factors = {name: (to_dense(block.A), to_dense(block.G)) for name, block in opt._running.factors.items()}
    divergence = sum(0.5 * torch.trace(d.T @ factors[name][1] @ d @ factors[name][0]) for name, d in moved.items())
    if radius == 1e-4:
        torch.testing.assert_close(divergence, torch.tensor(radius, dtype=torch.float64), rtol=1e-8, atol=0)
        shares = torch.stack([(moved[name] / freely[name]).flatten()[:3] for name in moved]).flatten()
        torch.testing.assert_close(shares, shares[:1].expand_as(shares), rtol=1e-6, atol=0)
    else:
        assert all(torch.equal(moved[name], freely[name]) for name in moved) and divergence < radius


@pytest.mark.parametrize("rows", [12, 4])
def test_rotations_in_another_dtype_differ_by_its_rounding(rows: int) -> None:
    """The moments keep the dtype of the parameters; an update in bfloat16 is near the one in float64, not equal."""
    likelihood, model = ng.Gaussian(), mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3, n=rows)
    before, twin, doubled = vector(model), copy.deepcopy(model), copy.deepcopy(model)
    ends = []
    for m, dtype in ((model, None), (twin, torch.bfloat16), (doubled, torch.float64)):
        opt = ng.EigenAdam(m, likelihood, subsets=EVERY, eps=1e-2, periods=Periods(3, (1,)), rotation_dtype=dtype)
        for _ in range(2):
            opt.step(x, y)
        assert opt._mean.dtype == torch.float64
        ends.append(vector(m) - before)
    assert torch.equal(ends[0], ends[2])
    distance = float((ends[1] - ends[0]).norm() / ends[0].norm())
    assert 1e-4 < distance < 0.03
    with pytest.raises(ValueError, match="rotation_dtype"):
        ng.EigenAdam(mlp(3, 2), likelihood, rotation_dtype=torch.int32)


class Scaled(nn.Module):
    """A linear layer and a parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


def test_an_uncovered_parameter_takes_adams_own_step_with_decoupled_weight_decay() -> None:
    torch.manual_seed(0)
    model = Scaled().double()
    model.linear.requires_grad_(False)
    twin = copy.deepcopy(model)
    x, y = data(ng.Gaussian(), 5, 3)
    settings: dict[str, Any] = {"nesterov": False, "warmup": 0, "clip": None, "eps": 1e-6, "weight_decay": 0.1}
    opt = ng.EigenAdam(model, ng.Gaussian(), lr=0.05, **settings)
    adam = torch.optim.AdamW([twin.scale], lr=0.05, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for _ in range(5):
        opt.step(x, y)
        adam.zero_grad()
        ng.Gaussian().nll(twin(x), y).backward()
        adam.step()
        torch.testing.assert_close(model.scale, twin.scale, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_broken_batch_changes_nothing(nesterov: bool) -> None:
    model, (x, y) = mlp(5, 4, 3), data(ng.Gaussian(), 5, 3)
    opt, twin = ng.EigenAdam(model, ng.Gaussian(), nesterov=nesterov), None
    for _ in range(3):
        opt.step(x, y)
    before, moments = vector(model), (opt._mean.clone(), opt._square.clone())
    twin = copy.deepcopy(model)
    state = opt.state_dict()
    opt.step(x * math.nan, y)
    assert opt.stats["skipped"] == 1 and torch.equal(vector(model), before)
    assert torch.equal(opt._mean, moments[0]) and torch.equal(opt._square, moments[1])
    other = ng.EigenAdam(twin, ng.Gaussian(), nesterov=nesterov)
    other.load_state_dict(state)
    assert opt.step(x, y) == other.step(x, y)


@pytest.mark.parametrize("rank", [64, 2])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_resuming_equals_an_uninterrupted_run(through_a_file: bool, rank: int) -> None:
    likelihood, model = ng.Bernoulli(), mlp(5, 4, 3)
    x, y = data(likelihood, 5, 3, n=40)
    settings: dict[str, Any] = {"periods": Periods(4, (1, 2)), "subsets": Subsets(0.5, 0.5), "seed": 3, "rank": rank}
    opt = ng.EigenAdam(model, likelihood, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)
    for _ in range(5):
        opt.step(x, y)
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 1.2e-2 / 2
    again, state = copy.deepcopy(model), opt.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(state)
    losses = [float(opt.step(x, y)) for _ in range(7)]
    resumed = ng.EigenAdam(again, likelihood, **settings)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 1.2e-2 / 2
    assert [float(resumed.step(x, y)) for _ in range(7)] == losses
    assert torch.equal(vector(again), vector(model)) and dict(resumed.stats) == dict(opt.stats)
    with pytest.raises(ValueError, match="parameter groups of"):
        ng.EigenAdam(mlp(5, 4, 4, 3), likelihood).load_state_dict(state)
    with pytest.raises(ValueError, match="shape|lacks"):
        ng.EigenAdam(mlp(5, 6, 3), likelihood).load_state_dict(state)


def test_it_trains_a_convolutional_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    x = torch.randn(60, 1, 6, 6)
    y = x.flatten(1)[:, :3].argmax(1)
    opt = ng.EigenAdam(model, ng.Categorical(), lr=0.02)
    first = float(opt.step(x, y))
    for _ in range(40):
        opt.step(x, y)
    assert ng.Categorical().nll(model(x), y).item() < 0.1 * first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"periods": 3}, "periods=3"),
        ({"subsets": 1}, "subsets=1"),
        ({"clip": 0.1}, "clip=0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup": -1}, "warmup=-1"),
        ({"width": 0.0}, "width=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ng.EigenAdam(mlp(3, 2), ng.Gaussian(), **settings)


def test_it_evaluates_the_model_itself() -> None:
    opt = ng.EigenAdam(mlp(3, 2), ng.Gaussian())
    with pytest.raises(TypeError, match="Preconditioner"):
        opt.step(closure=lambda: None)
    with pytest.raises(TypeError, match="inputs are missing"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.0
    assert opt.step() is None


def test_bases_of_wide_factors_are_reflections_and_those_of_another_rank_are_refused() -> None:
    model, (x, y) = mlp(9, 4, 3), data(ng.Gaussian(), 9, 3, n=20)
    opt = ng.EigenAdam(model, ng.Gaussian(), rank=3, static_inputs=x)
    opt.step(x, y)
    first = opt._bases.basis("0")
    assert first is not None and isinstance(first.QA, Reflectors) and isinstance(first.QG, torch.Tensor)
    opt.step(x, y)
    second = opt._bases.basis("0")
    assert second is not None and second.QA is first.QA and second.QG is not first.QG
    other = ng.EigenAdam(mlp(9, 4, 3), ng.Gaussian(), rank=4, static_inputs=x)
    with pytest.raises(ValueError, match="QA_Y"):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="anneal=0"):
        ng.EigenAdam(mlp(3, 2), ng.Gaussian(), anneal=0)
    with pytest.raises(ValueError, match="rank=0"):
        ng.EigenAdam(mlp(3, 2), ng.Gaussian(), rank=0)


def test_a_failed_basis_is_counted_and_the_last_one_kept() -> None:
    model, (x, y) = mlp(9, 4, 3), data(ng.Gaussian(), 9, 3, n=20)
    opt = ng.EigenAdam(model, ng.Gaussian(), rank=3)
    opt.step(x, y)
    kept, block = opt._bases.basis("0"), opt._running.factors["0"]
    opt._bases.refresh({"0": Factors(torch.full_like(block.A, torch.nan), block.G)})
    assert opt._bases.failures == 1 and opt._bases.basis("0") is kept
