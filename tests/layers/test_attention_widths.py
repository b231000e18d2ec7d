"""``nn.MultiheadAttention`` with ``kdim`` and ``vdim``: against the same attention from linear layers."""

from typing import Any

import pytest
import torch
from oracles.layers import draw
from torch import Tensor, nn

import natgrad as ng

CATEGORICAL, Y = ng.Categorical(), torch.arange(3)


class Attending(nn.Module):
    def __init__(self, batch_first: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = batch_first
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=batch_first, **options)
        self.head = nn.Linear(4, 3)
        for p in self.parameters():
            nn.init.normal_(p)
        self.double()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.first:
            return self.head(self.attention(q, k, v)[0].sum(1))
        return self.head(self.attention(*(x.transpose(0, 1) for x in (q, k, v)))[0].sum(0))


class Written(nn.Module):
    """The same from linear layers."""

    def __init__(self, model: Attending) -> None:
        super().__init__()
        own, bias = model.attention, model.attention.in_proj_bias is not None
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, 4, bias=bias).double() for d in (4, 3, 5))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            layer = self.get_submodule(name)
            layer.weight.data = getattr(own, f"{name}_weight").data.clone()
            if bias:
                layer.bias.data = own.in_proj_bias.data[4 * i : 4 * i + 4].clone()
        self.out, self.head = nn.Linear(4, 4, bias=bias).double(), model.head
        self.out.load_state_dict(own.out_proj.state_dict())

    def forward(self, *inputs: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(2, (2, 2)).transpose(1, 2) for f, x in zip(layers, inputs, strict=True))
        mixed = (q @ k.mT / 2**0.5).softmax(-1) @ v
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)).sum(1))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return draw(3, 5, 4), draw(3, 6, 3, seed=1), draw(3, 6, 5, seed=2)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_of_other_widths_have_the_factors_of_their_linear_layers(
    batch_first: bool, bias: bool, sharing: str
) -> None:
    model, x = Attending(batch_first, bias=bias), inputs()
    twin = Written(model)
    torch.testing.assert_close(model(*x), twin(*x))
    found = ng.kronecker_fisher(model, CATEGORICAL, x, sharing=sharing)
    expected = ng.kronecker_fisher(twin, CATEGORICAL, x, sharing=sharing).factors
    for name in ("q_proj", "k_proj", "v_proj"):
        A = expected[name].A
        A = A[:-1, :-1] if bias else A  # the bias is no part of the block
        torch.testing.assert_close(found.factors[f"attention.{name}"].A, A)
        torch.testing.assert_close(found.factors[f"attention.{name}"].G, expected[name].G)
    torch.testing.assert_close(found.factors["attention.out_proj"].to_dense(), expected["out"].to_dense())
    if bias:
        exact = ng.Fisher(model, CATEGORICAL, x).to_dense().diagonal()[16 + 12 + 20 :][:12]
        torch.testing.assert_close(found.factors["attention.in_proj_bias"].to_dense().diagonal(), exact)


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac"])
@pytest.mark.parametrize("expectation", ["sampled", "exact", "empirical"])
def test_it_trains(structure: str, expectation: Any) -> None:
    model, x = Attending(True, add_bias_kv=True), inputs()
    pre = ng.Preconditioner(model, CATEGORICAL, structure=structure, expectation=expectation)
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), 0.3), pre)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        z = model(*x)
        pre.observe(z, Y)
        loss = CATEGORICAL.nll(z, Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and pre.stats["bare"] == 0
    ng.KFAC(model, CATEGORICAL, structure=structure).step(x, Y)
