"""Per-example gradients equal a loop over the examples; the low-rank covariance and its inverse equal dense ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense, networks
from oracles.preconditioning import mlp
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.gradient_covariance import LowRankCovariance, low_rank_covariance
from natgrad.curvature.gradient_rows import LinearRows, TensorRows
from natgrad.curvature.per_example import PerExampleGradients
from natgrad.model_view import ModelView

LIKELIHOODS = {"gaussian": ng.Gaussian(), "bernoulli": ng.Bernoulli(), "categorical": ng.Categorical()}


def dense_gradients(case: networks.Case, y: Tensor, family: str) -> Tensor:
    call = case.forward or dense.default_call
    return dense.per_example_gradients(case.model, case.x, y, dense.nll(family), call)


def dense_covariance(R: Tensor, centered: bool) -> Tensor:
    if centered:
        R = R - R.mean(0)
    return R.T @ R / len(R)


@pytest.mark.parametrize("family", LIKELIHOODS)
@pytest.mark.parametrize("name", networks.NAMES)
def test_per_example_gradients_equal_a_loop(name: str, family: str) -> None:
    case = networks.case(name)
    y = networks.targets(family, case.z)
    view = ModelView(case.model, case.forward)
    before = torch.get_rng_state()
    collect = PerExampleGradients(view, chunk_size=2)
    passed = collect(LIKELIHOODS[family], case.x, y)
    expected = dense_gradients(case, y, family)
    torch.testing.assert_close(passed.rows.to_dense(), expected)
    torch.testing.assert_close(passed.nll, dense.nll(family)(case.z, y))
    torch.testing.assert_close(passed.rows.gram(), expected @ expected.T)
    again = collect(LIKELIHOODS[family], case.x, y)  # the second pass trusts the layers that the first one checked
    torch.testing.assert_close(again.rows.to_dense(), expected)
    assert torch.equal(torch.get_rng_state(), before)
    index = torch.arange(len(expected) - 1, -1, -1)[: max(1, len(expected) // 2)]
    some = collect(LIKELIHOODS[family], case.x, y, index)
    torch.testing.assert_close(some.rows.to_dense(), expected[index])
    assert some.gradient is not None
    torch.testing.assert_close(some.gradient, expected.sum(0))


class _Functional(nn.Module):
    """Calls a layer and uses its weight in another way as well, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.layer.weight


def test_a_layer_that_is_used_in_ways_that_no_hook_sees_gets_rows_of_its_own() -> None:
    torch.manual_seed(0)
    case = networks.Case(_Functional().double(), torch.randn(5, 3, dtype=torch.float64))
    y = networks.targets("gaussian", case.z)
    passed = PerExampleGradients(ModelView(case.model))(ng.Gaussian(), case.x, y)
    assert all(isinstance(block, TensorRows) for block in passed.rows.blocks)
    torch.testing.assert_close(passed.rows.to_dense(), dense_gradients(case, y, "gaussian"))


class _PositionsFirst(nn.Module):
    """Works through sequences with the positions in dimension 0, as torch.nn.Transformer does by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1).sum(1))


@pytest.mark.parametrize("positions", [5, 4])
def test_as_many_positions_as_examples_are_not_taken_for_examples(positions: int) -> None:
    torch.manual_seed(0)
    case = networks.Case(_PositionsFirst().double(), torch.randn(5, positions, 3, dtype=torch.float64))
    y = networks.targets("gaussian", case.z)
    expected = dense_gradients(case, y, "gaussian")
    for index in (None, torch.tensor([3, 1])):
        collect = PerExampleGradients(ModelView(case.model))
        for _ in range(2):
            rows = collect(ng.Gaussian(), case.x, y, index).rows.to_dense()
            torch.testing.assert_close(rows, expected if index is None else expected[index])


def test_plain_layers_are_never_written_out_and_long_sequences_are() -> None:
    model, x = mlp(6, 7, 2), torch.randn(4, 6, dtype=torch.float64)
    passed = PerExampleGradients(ModelView(model))(ng.Gaussian(), x, torch.zeros(4, 2, dtype=torch.float64))
    assert all(isinstance(block, LinearRows) for block in passed.rows.blocks)
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    passed = PerExampleGradients(ModelView(model))(ng.Gaussian(), x, torch.zeros(4, 9, 2, dtype=torch.float64))
    assert all(isinstance(block, TensorRows) for block in passed.rows.blocks)


class _Mixed(nn.Module):
    """Takes a tensor that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        return (self.norm(x) + mixing) @ mixing.T


@pytest.mark.parametrize("chunk_size", [4, 6, 3, 1])
def test_a_tensor_that_all_examples_share_may_be_as_long_as_a_chunk(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, mixing = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (10, 4))
    model = _Mixed().double()
    x = x[:, None].repeat(1, 4, 1) * torch.arange(1, 5)[:, None]
    y = torch.zeros(10, 4, 4, dtype=torch.float64)
    expected = dense.per_example_gradients(model, x, y, dense.nll("gaussian"), lambda m, some: m(some, mixing))
    rows = PerExampleGradients(ModelView(model), chunk_size)(ng.Gaussian(), (x, mixing), y).rows.to_dense()
    torch.testing.assert_close(rows, expected)


class _Stubborn(nn.Module):
    """Decides by a value, so that no batched derivative exists."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if float(x.sum()) > 0 else x * self.scale**2


def test_models_without_batched_derivatives_are_differentiated_one_example_after_the_other() -> None:
    model = _Stubborn()
    x = torch.tensor([[1.0, 2.0], [-1.0, -3.0], [0.5, 0.0]], dtype=torch.float64)
    y = torch.zeros_like(x)
    rows = PerExampleGradients(ModelView(model))(ng.Gaussian(), x, y).rows.to_dense()
    s = model.scale.detach()
    expected = torch.stack([s * x[0] ** 2, 2 * s**3 * x[1] ** 2, s * x[2] ** 2])
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("name", ["mlp", "no_bias", "tied", "layer_norm", "scalar", "conv", "sequence", "frozen"])
def test_low_rank_form_is_the_matrix_free_operator(name: str, centered: bool) -> None:
    case = networks.case(name)
    y = networks.targets("bernoulli", case.z)
    matrix_free = ng.GradientCovariance(case.model, ng.Bernoulli(), case.x, y, centered=centered)
    low_rank = low_rank_covariance(case.model, ng.Bernoulli(), case.x, y, centered=centered)
    torch.testing.assert_close(low_rank.to_dense(), matrix_free.to_dense())
    eigenvalues = torch.linalg.eigvalsh(matrix_free.to_dense())
    torch.testing.assert_close(low_rank.eigenvalues(), eigenvalues[-len(low_rank.rows) :].clamp(min=0))


def block_mask(model: nn.Module, blocks: str) -> Tensor:
    """1 where two parameters are in the same block."""
    labels, label = [], {}
    for name, p in model.named_parameters():
        key = {"full": "", "layer": name.rpartition(".")[0], "tensor": name}[blocks]
        labels += [label.setdefault(key, len(label))] * p.numel()
    of = torch.tensor(labels)
    return (of[:, None] == of).double()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    n=st.integers(1, 9),
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    centered=st.booleans(),
    blocks=st.sampled_from(["full", "layer", "tensor"]),
    damping=st.sampled_from([1e-3, 0.1, 3.0]),
    seed=st.integers(0, 9),
)
def test_low_rank_solve_equals_the_dense_one(
    n: int, widths: list[int], centered: bool, blocks: Any, damping: float, seed: int
) -> None:
    model = mlp(*widths, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, widths[0], generator=generator, dtype=torch.float64)
    y = torch.randn(n, widths[-1], generator=generator, dtype=torch.float64)
    covariance = low_rank_covariance(model, ng.Gaussian(), x, y, centered=centered, blocks=blocks)
    R = dense.per_example_gradients(model, x, y, dense.nll("gaussian"))
    C = dense_covariance(R, centered) * block_mask(model, blocks)
    torch.testing.assert_close(covariance.to_dense(), C)
    damped = C + damping * torch.eye(len(C), dtype=C.dtype)
    inverse = covariance.inverse(damping)
    v = torch.randn(len(C), 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(inverse @ v, torch.linalg.solve(damped, v))
    torch.testing.assert_close(inverse @ v[:, 0], torch.linalg.solve(damped, v[:, 0]))
    u = torch.randn(n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(inverse.of_combination(u), torch.linalg.solve(damped, R.T @ u))
    assert inverse.ok


def test_single_precision_keeps_its_digits_where_the_gradient_is_a_combination_of_the_rows() -> None:
    model, x = mlp(20, 15, 5), torch.randn(30, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.zeros(30, 5, dtype=torch.float64)
    u = torch.full((30,), 1 / 30, dtype=torch.float64)
    exact = low_rank_covariance(model, ng.Gaussian(), x, y, centered=False).inverse(1e-6).of_combination(u)
    single = low_rank_covariance(model.float(), ng.Gaussian(), x.float(), y.float(), centered=False)
    found = single.inverse(1e-6).of_combination(u.float())
    assert found.dtype == torch.float32
    assert torch.linalg.vector_norm(found - exact) < 1e-3 * torch.linalg.vector_norm(exact)


def test_batches_append() -> None:
    case = networks.case("conv")
    y = networks.targets("gaussian", case.z)
    collect = PerExampleGradients(ModelView(case.model))
    both = collect(ng.Gaussian(), case.x[:2], y[:2]).rows.append(collect(ng.Gaussian(), case.x[2:], y[2:]).rows)
    whole = collect(ng.Gaussian(), case.x, y).rows
    torch.testing.assert_close(both.to_dense(), whole.to_dense())
    torch.testing.assert_close(LowRankCovariance(both).to_dense(), LowRankCovariance(whole).to_dense())


def test_cross_products_of_two_batches() -> None:
    case = networks.case("mlp")
    y = networks.targets("gaussian", case.z)
    collect = PerExampleGradients(ModelView(case.model))
    left, right = collect(ng.Gaussian(), case.x, y).rows, collect(ng.Gaussian(), case.x[:3] + 1, y[:3]).rows
    torch.testing.assert_close(left.gram(right), left.to_dense() @ right.to_dense().T)


def test_bad_arguments_are_named() -> None:
    model, x, y = mlp(3, 2), torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="blocks='rows': expected one of 'full', 'layer', 'tensor'"):
        low_rank_covariance(model, ng.Gaussian(), x, y, blocks="rows")  # type: ignore
    with pytest.raises(
        ValueError, match=r"damping=0: 4 gradients give a matrix of 8 rows.*pass a damping, for example"
    ):
        low_rank_covariance(model, ng.Gaussian(), x, y).inverse(0.0)
    with pytest.raises(ValueError, match="damping=-1"):
        low_rank_covariance(model, ng.Gaussian(), x, y).inverse(-1.0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        low_rank_covariance(model, ng.Gaussian(), x, y, chunk_size=0)
    with pytest.raises(TypeError, match="likelihood: expected an object"):
        low_rank_covariance(model, nn.MSELoss(), x, y)  # type: ignore
    normed = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' normalises by the statistics.*call model.eval\(\) first"):
        low_rank_covariance(normed, ng.Gaussian(), x, y)
