"""EKFAC of attention, embeddings, normalisation and bare parameters: the exact diagonal in the eigenbasis."""

from typing import Any

import pytest
import torch
from curvature.test_ekfac_convolutions import check
from layers.test_kinds import Attending, Written
from optim.test_layer_kinds import small
from oracles.layers import draw
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.inverse import kronecker_basis


class Reader(nn.Module):
    """An embedding that is called once or twice, and what becomes of it; with padding two positions are the pad."""

    def __init__(self, padding: int | None = None, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(5, 3, padding_idx=padding), nn.LayerNorm(3)
        self.gain, self.head, self.twice = nn.Parameter(torch.rand(3) + 0.5), nn.Linear(3, 3), twice
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        if self.twice:
            h = h * self.embedding(4 - ids).cos()
        return self.head(torch.tanh(self.norm(h) * self.gain).sum(1))


@pytest.mark.parametrize("likelihood", [ng.Categorical(), ng.Bernoulli("element")], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_embedding_normalisation_and_bare_parameters(padding: int | None, twice: bool, likelihood: Any) -> None:
    ids = torch.tensor([[0, 1, 1, 3], [2, 2, 3, 1], [0, 4, 0, 2]])
    model = Reader(padding, twice)
    check(model, likelihood, ids)
    F = ng.Fisher(model, likelihood, ids).to_dense()
    k = ng.kronecker_fisher(model, likelihood, ids, structure="ekfac")
    for (index, block), name in zip(k.blocks, k.factors, strict=True):
        if name in ("norm", "gain"):
            torch.testing.assert_close(block._dense().diagonal(), F[index, index])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", ["self", "two", "three"])
def test_attention(cross: str, bias: bool, sharing: str) -> None:
    """In its own basis the diagonal of F; in all the same as linear layers that are called."""
    model, x = Attending(cross, bias=bias), draw(3, 5, 4)
    check(model, ng.Categorical(), x, sharing=sharing)
    found = ng.kronecker_fisher(model, ng.Categorical(), x, structure="ekfac", sharing=sharing)
    twin = ng.kronecker_fisher(Written(model), ng.Categorical(), x, structure="ekfac", sharing=sharing)
    for name, i, block in [
        *(("attention.in_proj", i, n) for i, n in enumerate("qkv")),
        ("attention.out_proj", None, "out"),
    ]:
        S = found.factors[name].S if i is None else found.factors[name].S[i]
        # Without a bias the softmax makes G of the keys singular: vectors of its null space are anybody's choice.
        torch.testing.assert_close(S.sum(), twin.factors[block].S.sum())


def test_a_transformer_with_the_positions_first() -> None:
    """``batch_first=False``: attention, linear layers and normalisation see [positions, examples, width]."""
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x.transpose(0, 1)).mean(0))

    check(Encoder().double(), ng.Categorical(), draw(3, 4, 4))


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_whole_models(name: str) -> None:
    model, x, _ = small(name)
    check(model, ng.Categorical(), x)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_updates_follow_the_second_moments(name: str) -> None:
    """A step of Preconditioner with S of two batches, against its dense twin."""
    model, x, y = small(name)
    likelihood = ng.Categorical("element")
    given = {"structure": "ekfac", "expectation": "exact", "scaling": None, "damping": 0.1}
    pre = ng.Preconditioner(model, likelihood, periods=ng.Renewal(100, (1,), 1), decay=0.5, **given)
    flipped = x.flip(0) * (1 if x.dtype == torch.int64 else 0.5)
    for batch in (x, flipped):
        model.zero_grad()
        z = model(batch)
        pre.observe(z)
        likelihood.nll(z, y).backward()
        gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
        pre.step()
    k = ng.kronecker_fisher(model, likelihood, x)
    F = ng.Fisher(model, likelihood, flipped).to_dense()
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    bases = {n: pre._inverses._kept[n] for n in k.factors}
    for (index, _), (n, factors) in zip(k.blocks, k.factors.items(), strict=True):
        Q, first = kronecker_basis(bases[n]), factors.to_dense()
        diagonal = (Q.T @ first @ Q).diagonal()
        if n not in pre._inverses._diagonal:  # the second batch's moments in the first one's basis
            diagonal = 0.5 * diagonal + 0.5 * (Q.T @ F[index[:, None], index] @ Q).diagonal()
        expected = Q @ ((Q.T @ gradient[index]) / (diagonal + 0.1))
        torch.testing.assert_close(after[index], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_kfac_trains_and_resumes_bit_for_bit(name: str) -> None:
    model, x, y = small(name)
    likelihood = ng.Categorical("element")
    opt = ng.KFAC(model, likelihood, structure="ekfac")
    first = opt.step(x, y)
    for _ in range(9):
        opt.step(x, y)
    other, *_ = small(name)
    other.load_state_dict(model.state_dict())
    again = ng.KFAC(other, likelihood, structure="ekfac")
    again.load_state_dict(opt.state_dict())
    for _ in range(10):
        opt.step(x, y)
        again.step(x, y)
    assert likelihood.nll(model(x), y) < 0.2 * first
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
