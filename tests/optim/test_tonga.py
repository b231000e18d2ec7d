"""TONGA's step equals the dense solve; what it does with parts of batches, equal gradients and one example."""

from typing import Any

import pytest
import torch
from oracles import dense
from oracles.kfac import data, gradient_of, mlp, vector
from torch import Tensor, nn

import natgrad as ng

LIKELIHOODS = {
    "gaussian": ng.Gaussian(),
    "bernoulli": ng.Bernoulli(normalizer="element"),
    "categorical": ng.Categorical(),
}


def tonga(model: nn.Module, likelihood: Any, **settings: Any) -> ng.TONGA:
    """Single steps of length 1, unless the settings say otherwise."""
    return ng.TONGA(model, likelihood, **{"lr": 1.0, "momentum": 0.0, "share": 0.01, **settings})


def dense_step(model: nn.Module, family: str, x: Any, y: Any, damping: float | None, centered: bool = True) -> Tensor:
    """−(C + λ I)^{-1} ∇h with C and ∇h from a loop over the examples; λ a hundredth of the trace where it is None."""
    R = dense.per_example_gradients(model, x, y, dense.nll(family))
    gradient = gradient_of(model, LIKELIHOODS[family], x, y)
    if centered:
        R = R - R.mean(0)
    C = R.T @ R / len(R)
    lam = 0.01 * C.trace() if damping is None else damping
    return -torch.linalg.solve(C + lam * torch.eye(len(C), dtype=C.dtype), gradient)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("family", LIKELIHOODS)
def test_a_step_is_the_dense_solve(family: str, damping: float | None, centered: bool) -> None:
    model, (x, y) = mlp(4, 5, 3), data(LIKELIHOODS[family], 4, 3)
    expected = 0.5 * dense_step(model, family, x, y, damping, centered)
    before, loss = vector(model), LIKELIHOODS[family].nll(model(x), y)
    opt = tonga(model, LIKELIHOODS[family], lr=0.5, damping=damping, centered=centered)
    found = opt.step(x, y)
    torch.testing.assert_close(vector(model) - before, expected)
    torch.testing.assert_close(found, loss.detach())
    assert opt.stats["step_norm"] == pytest.approx(2 * float(expected.norm()))
    assert opt.stats["rank"] == 12 - centered


@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
def test_micro_batches_are_one_batch(family: str) -> None:
    model, (x, y) = mlp(4, 5, 3), data(LIKELIHOODS[family], 4, 3)
    expected, before = dense_step(model, family, x, y, 0.1), vector(model)
    tonga(model, LIKELIHOODS[family], damping=0.1, centered=True).step(x, y, micro_batch_size=5)
    torch.testing.assert_close(vector(model) - before, expected)
    nn.utils.vector_to_parameters(before.clone(), model.parameters())
    tonga(model, LIKELIHOODS[family], damping=0.1, centered=True).step([(x[:7], y[:7]), (x[7:], y[7:])])
    torch.testing.assert_close(vector(model) - before, expected)


@pytest.mark.parametrize("blocks", ["layer", "tensor"])
def test_blocks_take_nothing_from_each_other(blocks: Any) -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    R = dense.per_example_gradients(model, x, y, dense.nll("gaussian"))
    gradient, before = R.mean(0), vector(model)
    sizes = [25, 18] if blocks == "layer" else [p.numel() for p in model.parameters()]
    parts = []
    for r, g in zip(R.split(sizes, 1), gradient.split(sizes), strict=True):
        r = r - r.mean(0)
        parts.append(-torch.linalg.solve(r.T @ r / len(r) + 0.2 * torch.eye(r.shape[1], dtype=r.dtype), g))
    tonga(model, ng.Gaussian(), damping=0.2, centered=True, blocks=blocks).step(x, y)
    torch.testing.assert_close(vector(model) - before, torch.cat(parts))


def test_the_covariance_of_some_examples_and_the_gradient_of_all() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(7))[:5]
    R = dense.per_example_gradients(model, x, y, dense.nll("gaussian"))
    some = R[chosen] - R[chosen].mean(0)
    C, before = some.T @ some / 5, vector(model)
    tonga(model, ng.Gaussian(), damping=0.2, centered=True, gradients=5, seed=7).step(x, y)
    expected = -torch.linalg.solve(C + 0.2 * torch.eye(len(C), dtype=C.dtype), R.mean(0))
    torch.testing.assert_close(vector(model) - before, expected)


@pytest.mark.parametrize("gradients", [1, 2, 5, 11])
def test_as_many_examples_enter_however_the_batch_is_cut(gradients: int) -> None:
    """Every micro-batch once gave one at least: four of them made four of ``gradients=2``."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 1, 5, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    steps, ranks = [], []
    for size in (None, 5, 3, 1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
        before = vector(model)
        opt = tonga(model, ng.Gaussian(), damping=0.2, gradients=gradients)
        for _ in range(2):
            opt.step(x, y, size)
        steps.append(vector(model) - before)
        ranks.append(opt.stats["rank"])
    assert ranks == [gradients] * 4
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])


class _Sequences(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).sum(1))


@pytest.mark.parametrize("lengths", [(2, 3), (3, 2, 1), (1, 9), (9, 2, 9)])
def test_micro_batches_of_sequences_of_different_lengths(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = _Sequences(20).double()
    batches = [(torch.randn(3, t, 3).double(), torch.randn(3, 2).double()) for t in lengths]
    R = torch.cat([dense.per_example_gradients(model, x, y, dense.nll("gaussian")) for x, y in batches])
    C = R.T @ R / len(R)
    expected = -torch.linalg.solve(C + 0.2 * torch.eye(len(C), dtype=C.dtype), R.mean(0))
    before = vector(model)
    tonga(model, ng.Gaussian(), damping=0.2).step(batches)
    torch.testing.assert_close(vector(model) - before, expected)


def test_convolutions_and_sequences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x, y = torch.randn(6, 1, 3, 3, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    expected, before = dense_step(model, "gaussian", x, y, None), vector(model)
    tonga(model, ng.Gaussian(), centered=True).step(x, y)
    torch.testing.assert_close(vector(model) - before, expected)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("chunk_size, micro_batch_size", [(None, None), (4, None), (5, 5), (2, 3)])
def test_dropout_leaves_the_gradient_that_of_the_loss(
    chunk_size: int | None, micro_batch_size: int | None, centered: bool
) -> None:
    """Layers that go through torch.func once drew masks of their own: the step was along no gradient of any loss."""
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.randn(6, 1, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    size = micro_batch_size or 6
    torch.manual_seed(3)
    losses = [
        ng.Gaussian().nll(model(part), y[i : i + size], count=6)
        for i, part in zip(range(0, 6, size), x.split(size), strict=True)
    ]
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(sum(losses), list(model.parameters()))])
    before = vector(model)
    torch.manual_seed(3)
    opt = ng.TONGA(model, ng.Gaussian(), damping=1e9, lr=1e9, momentum=0.0, centered=centered, chunk_size=chunk_size)
    loss = opt.step(x, y, micro_batch_size)
    torch.testing.assert_close(loss, sum(losses).detach())
    torch.testing.assert_close(vector(model) - before, -gradient, atol=1e-7, rtol=0)


def test_the_relative_damping_makes_steps_inversely_proportional_to_the_scale_of_the_loss() -> None:
    steps = []
    for variance in (1.0, 0.1):
        model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
        before = vector(model)
        tonga(model, ng.Gaussian(variance=variance)).step(x, y)
        steps.append(vector(model) - before)
    torch.testing.assert_close(steps[1], 0.1 * steps[0])


def test_centring_makes_the_step_longer_by_what_the_uncentred_one_foretells() -> None:
    steps = []
    for centered in (False, True):
        model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
        gradient, before = gradient_of(model, ng.Gaussian(), x, y), vector(model)
        tonga(model, ng.Gaussian(), damping=0.2, centered=centered).step(x, y)
        steps.append(vector(model) - before)
    foretold = -gradient @ steps[0]
    assert 0 < foretold < 1
    torch.testing.assert_close(steps[1], steps[0] / (1 - foretold))


def test_gradients_that_are_all_zero_move_nothing() -> None:
    model, x = mlp(4, 5, 3), torch.randn(6, 4, dtype=torch.float64)
    y, before = model(x).detach(), vector(model)
    opt = tonga(model, ng.Gaussian())
    assert opt.step(x, y) == 0 and opt.stats["step_norm"] == 0 and opt.stats["skipped"] == 0
    assert torch.equal(vector(model), before)


def test_one_example_has_no_covariance() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    before = vector(model)
    with pytest.raises(ValueError, match="gradient of one example has no covariance.*centered=False"):
        tonga(model, ng.Gaussian(), centered=True).step(x[:1], y[:1])
    assert torch.equal(vector(model), before)
    tonga(model, ng.Gaussian(), centered=False).step(x[:1], y[:1])
    assert not torch.equal(vector(model), before)


def test_batch_normalisation_by_the_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x, y = data(ng.Gaussian(), 4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="BatchNorm1d '1' normalises by the statistics of the batch"):
        tonga(model, ng.Gaussian()).step(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tonga(model.eval(), ng.Gaussian()).step(x, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping=0.0: expected a positive number or None"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"share": 0.0}, "share=0.0"),
        ({"blocks": "rows"}, "blocks='rows'"),
        ({"gradients": 0}, "gradients=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tonga(mlp(4, 3), ng.Gaussian(), **settings)


def test_momentum_adds_up_directions() -> None:
    model, (x, y) = mlp(4, 5, 3), data(ng.Gaussian(), 4, 3)
    opt, velocity = tonga(model, ng.Gaussian(), lr=0.1, damping=0.3, momentum=0.8), torch.zeros(43)
    for _ in range(3):
        velocity = 0.8 * velocity + dense_step(model, "gaussian", x, y, 0.3, centered=False)
        expected = vector(model) + 0.1 * velocity
        opt.step(x, y)
        torch.testing.assert_close(vector(model), expected)
