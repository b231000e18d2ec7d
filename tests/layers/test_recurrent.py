"""Recurrent cells: the factors of their two linear maps, against the same cells written with linear layers."""

from typing import Any

import pytest
import torch
from curvature.test_ekfac_convolutions import check
from oracles.layers import draw
from oracles.recurrent import learns_a_sum
from torch import Tensor, nn

import natgrad as ng

CELLS: dict[str, tuple[Any, int]] = {
    "rnn": (nn.RNNCell, 1),
    "relu": (lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options), 1),
    "lstm": (nn.LSTMCell, 4),
    "gru": (nn.GRUCell, 3),
}


class Sequence(nn.Module):
    """A cell over the steps of a sequence, then a linear layer on the last state."""

    def __init__(self, name: str, bias: bool = True, head: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = CELLS[name][0](3, 4, bias=bias), nn.Linear(4, head)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Written(nn.Module):
    """The same from its definition, as torch's documentation prints it."""

    def __init__(self, model: Sequence, name: str) -> None:
        super().__init__()
        self.name, gates, bias = name, CELLS[name][1], model.cell.bias
        self.ih, self.hh = nn.Linear(3, 4 * gates, bias).double(), nn.Linear(4, 4 * gates, bias).double()
        self.head = model.head
        for own, key in ((self.ih, "ih"), (self.hh, "hh")):
            own.weight.data = getattr(model.cell, f"weight_{key}").data.clone()
            if bias:
                own.bias.data = getattr(model.cell, f"bias_{key}").data.clone()

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            a, b = self.ih(step), self.hh(h)
            if self.name == "lstm":
                i, f, g, o = (a + b).split(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.name == "gru":
                r, z, n = a.split(4, dim=1)
                r, z = (r + b[:, :4]).sigmoid(), (z + b[:, 4:8]).sigmoid()
                h = (1 - z) * (n + r * b[:, 8:]).tanh() + z * h
            else:
                h = torch.tanh(a + b) if self.name == "rnn" else torch.relu(a + b)
        return self.head(h)


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_factors_of_the_linear_maps(name: str, bias: bool, expectation: str) -> None:
    model, x, y = Sequence(name, bias), draw(5, 4, 3), torch.arange(5) % 3
    twin = Written(model, name)
    torch.testing.assert_close(model(x), twin(x))
    given = {"expectation": expectation, "y": y}
    found = ng.kronecker_fisher(model, ng.Categorical(), x, **given)
    expected = ng.kronecker_fisher(twin, ng.Categorical(), x, **given)
    assert set(found.factors) == {"cell.ih", "cell.hh", "head"}
    for key in ("ih", "hh"):
        torch.testing.assert_close(found.factors[f"cell.{key}"].A, expected.factors[key].A)
        torch.testing.assert_close(found.factors[f"cell.{key}"].G, expected.factors[key].G)
    torch.testing.assert_close(found.factors["head"].to_dense(), expected.factors["head"].to_dense())
    torch.testing.assert_close(found.to_dense().trace(), expected.to_dense().trace())


@pytest.mark.parametrize("name", CELLS)
def test_one_step_of_one_example_is_exact_and_ekfac_has_the_diagonal(name: str) -> None:
    model, x = Sequence(name), draw(3, 4, 3)
    one = x[:1, :1]
    F = ng.Fisher(model, ng.Categorical(), one).to_dense()
    k = ng.kronecker_fisher(model, ng.Categorical(), one)
    for index, block in k.blocks:
        torch.testing.assert_close(block.to_dense(), F[index[:, None], index])
    check(model, ng.Categorical(), x)


@pytest.mark.parametrize("name", CELLS)
def test_frozen_parts_and_bare_calls(name: str) -> None:
    """A frozen bias leaves its block; a call without a batch is one example."""
    model = Sequence(name)
    model.cell.bias_hh.requires_grad_(False)
    k = ng.kronecker_fisher(model, ng.Categorical(), draw(5, 4, 3))
    assert k.factors["cell.hh"].A.shape == (4, 4) and k.factors["cell.ih"].A.shape == (4, 4)
    model.cell.bias_ih.requires_grad_(False)
    assert ng.kronecker_fisher(model, ng.Categorical(), draw(5, 4, 3)).factors["cell.ih"].A.shape == (3, 3)


@pytest.mark.parametrize("name", CELLS)
def test_training(name: str) -> None:
    learns_a_sum(lambda: Sequence(name, head=2), below=0.3)


def test_nothing_stays_behind() -> None:
    """Outside recorded passes the kernel runs; an exception inside a call leaves no mode active."""
    model, x = Sequence("gru"), draw(5, 4, 3)
    z = model(x)
    ng.kronecker_fisher(model, ng.Categorical(), x)
    assert torch.equal(model(x), z)
    with pytest.raises((RuntimeError, ValueError)):
        ng.kronecker_fisher(model, ng.Categorical(), draw(5, 4, 7))
    assert torch.equal(model(x), z)
    assert not torch.overrides._get_current_function_mode_stack()
