"""Positions of an example: where "expand" and "reduce" are exact, and how the examples are told apart."""

from typing import Any

import pytest
import torch
from oracles.layers import draw
from torch import Tensor, nn

import natgrad as ng


class Deep(nn.Module):
    """Linear maps at every position, then all positions' outputs, or a linear map of their mean."""

    def __init__(self, pooled: bool, conv: bool = False, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(3, 4, 1) if conv else nn.Linear(3, 4)
        self.two, self.pooled, self.conv, self.first = nn.Linear(4, 2), pooled, conv, first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.conv:
            x = self.one(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.one(x.transpose(0, 1)).transpose(0, 1) if self.first else self.one(x)
        return self.two(x.mean(1)) if self.pooled else self.two(x)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_for_deep_linear_networks(sharing: str, conv: bool) -> None:
    """Gaussian noise: expand for a summed loss of all positions, reduce for one of their mean; not the other way."""
    x, sizes = draw(5, 4, 3), {"one": slice(0, 16), "two": slice(16, 26)}
    for pooled in (False, True):
        model = Deep(pooled, conv)
        found = ng.kronecker_fisher(model, ng.Gaussian(0.5), x, sharing=sharing).to_dense()
        exact = ng.Fisher(model, ng.Gaussian(0.5), x).to_dense()
        for name, where in sizes.items():
            if pooled == (sharing == "reduce") or (pooled and name == "two"):
                torch.testing.assert_close(found[where, where], exact[where, where])
            else:
                assert (found[where, where] - exact[where, where]).norm() > 0.1 * exact[where, where].norm()


def test_sharing_by_layer_and_positions_first() -> None:
    x = draw(5, 4, 3)
    both = ng.kronecker_fisher(Deep(True), ng.Gaussian(), x, sharing="reduce")
    one = ng.kronecker_fisher(Deep(True), ng.Gaussian(), x, sharing={"one": "reduce"})
    torch.testing.assert_close(one.to_dense(), both.to_dense())
    swapped = ng.kronecker_fisher(Deep(True, first=True), ng.Gaussian(), x, sharing="reduce")
    torch.testing.assert_close(swapped.to_dense(), both.to_dense())
    assert "Kronecker 4 x 4, reduce" in str(both.coverage())


def test_reduce_refuses_what_it_cannot_tell_apart() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(0, 1)).view(*x.shape[:2], 2).mean(1)

    with pytest.raises(ValueError, match=r"'fc' sees a tensor of shape \(20, 3\) without the 5 examples"):
        ng.kronecker_fisher(Flat().double(), ng.Gaussian(), draw(5, 4, 3), sharing="reduce")


class PositionsFirst(nn.Module):
    """A normalisation and an attention that see [positions, examples, features]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attention, self.head = nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.transpose(0, 1))
        return self.head(self.attention(h, h, h)[0].mean(0))


def test_positions_first() -> None:
    model, x = PositionsFirst(), draw(5, 4, 4)
    k = ng.kronecker_fisher(model, ng.Categorical(), x)
    exact = ng.Fisher(model, ng.Categorical(), x).to_dense().diagonal()[:8]
    torch.testing.assert_close(k.to_dense().diagonal()[:8], exact)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [PositionsFirst, lambda: Deep(True), lambda: Deep(True, conv=True)])
def test_leading_examples_of_a_longer_pass(make: Any, sharing: str) -> None:
    """The statistics of some examples from a pass of more, as K-FAC takes them."""
    from natgrad.curvature.kfac import collect, factors_from, statistics_from
    from natgrad.layers.capture import Capture
    from natgrad.layers.coverage import cover
    from natgrad.model_view import ModelView

    model = make()
    x = draw(5, 4, 4 if isinstance(model, PositionsFirst) else 3)
    view = ModelView(model)
    capture = Capture(model, cover(view, sharing=sharing).blocks)
    with capture.record() as record:
        z = view(x)
    found = factors_from(statistics_from(record, z, ng.Categorical(), rows=2, expectation="exact"))
    expected = factors_from(collect(view, capture, ng.Categorical(), x[:2], expectation="exact"))
    for name, factors in expected.items():
        torch.testing.assert_close(found[name].to_dense(), factors.to_dense())
