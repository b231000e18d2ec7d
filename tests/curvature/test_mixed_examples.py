"""Models in which a layer's rows are not those of single examples: flattened tokens, positions that all examples share,
batch normalisation. Each against a twin that keeps the examples apart, or against the Jacobian of the whole batch."""

from typing import Any

import pytest
import torch
from oracles.layers import draw, softmax_fisher
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.inverse import kronecker_basis


class Tokens(nn.Module):
    """A class for every token; attention mixes them. The output keeps its shape, or has a row for every token."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = flat
        self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embedding(ids))
        z = self.head(h + self.attention(h, h, h, need_weights=False)[0])
        return z.flatten(0, 1) if self.flat else z


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("how", ["observe", "update", "operator"])
def test_an_exact_expectation_of_flattened_tokens_keeps_their_scores_apart(how: str, batch: int) -> None:
    ids = torch.arange(6 * batch).view(batch, 6) * 3 % 5
    likelihood = ng.Categorical("element")
    found = []
    for flat in (False, True):
        model = Tokens(flat)
        if how == "operator":
            found.append(ng.kronecker_fisher(model, likelihood, ids).to_dense())
            continue
        pre = ng.Preconditioner(model, likelihood, expectation="exact")
        z = model(ids)
        pre.observe(z) if how == "observe" else pre.update(ids)
        z.sum().backward()
        pre.step()
        found.append([factors.to_dense() for factors in pre._running.factors.values()])
    torch.testing.assert_close(*found)


class Positions(nn.Module):
    """Learned positions that go through layers of their own: once for all examples, or once for each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = shared
        self.token, self.position = nn.Embedding(6, 4), nn.Embedding(5, 4)
        self.linear, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(5) if self.shared else torch.arange(5).expand(len(ids), 5)
        return self.head(torch.tanh(self.token(ids) + self.norm(self.linear(self.position(where)))).mean(1))


@pytest.mark.parametrize("batch", [2, 7])
def test_positions_that_all_examples_share_are_those_of_each(batch: int) -> None:
    ids = torch.arange(5 * batch).view(batch, 5) * 5 % 6
    found = [ng.kronecker_fisher(Positions(shared), ng.Categorical(), ids).to_dense() for shared in (True, False)]
    torch.testing.assert_close(*found)


def dense_fisher(model: nn.Module, x: Tensor) -> Tensor:
    """Of the whole batch: the scores of different examples are independent, whatever their outputs depend on."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        z = torch.func.functional_call(model, (parameters, buffers), (x,))
        assert isinstance(z, Tensor)
        return z

    z = outputs(parameters).detach()
    J = torch.cat([j.reshape(*z.shape, -1) for j in torch.func.jacrev(outputs)(parameters).values()], dim=2)
    return torch.einsum("nop,noq,nqr->pr", J, torch.stack([softmax_fisher(one) for one in z]), J) / len(x)


def normalised(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    first: dict[str, Any] = {
        "linear": lambda: [nn.Linear(3, 4)],
        "groups": lambda: [nn.Conv1d(2, 4, 2, groups=2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)],
        "embedding": lambda: [nn.Embedding(5, 2), nn.Flatten(), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)],
    }
    rest = [nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*first[kind](), *rest).double()
    for p in model.parameters():
        nn.init.normal_(p)
    x = {"linear": draw(6, 3), "groups": draw(6, 2, 3), "embedding": torch.arange(18).view(6, 3) ** 2 % 5}[kind]
    return model, x


@pytest.mark.parametrize("kind", ["linear", "groups", "embedding"])
def test_two_batch_normalisations_have_their_exact_diagonals(kind: str) -> None:
    """Every row of the first one's output reaches every example through the second one."""
    model, x = normalised(kind)
    exact = dense_fisher(model, x)
    for structure in ("block_diagonal", "ekfac"):
        k = ng.kronecker_fisher(model, ng.Categorical(), x, structure=structure)
        for name, (index, block) in zip(k.factors, k.blocks, strict=True):
            own, found = exact[index[:, None], index], block.to_dense()
            if isinstance(model.get_submodule(name), nn.BatchNorm1d):
                torch.testing.assert_close(found, torch.diag(own.diagonal()))
            elif structure == "ekfac":
                Q = kronecker_basis(k.bases[name])
                torch.testing.assert_close((Q.T @ found @ Q).diagonal(), (Q.T @ own @ Q).diagonal())


def test_sampled_targets_estimate_them_without_bias() -> None:
    model, x = normalised("linear")
    exact = dense_fisher(model, x).diagonal()[16:20]  # the shift of the first one; other positions' scores cancel
    generator = torch.Generator().manual_seed(0)
    k = ng.kronecker_fisher(model, ng.Categorical(), x, expectation="sampled", samples=4000, generator=generator)
    torch.testing.assert_close(
        k.to_dense().diagonal()[20:24], dense_fisher(model, x).diagonal()[20:24], rtol=0.1, atol=0
    )
    torch.testing.assert_close(k.to_dense().diagonal()[16:20], exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("how", ["observe", "update"])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_statistics_of_the_first_rows_normalise_as_the_whole_batch_did(expectation: str, how: str) -> None:
    class Affine(nn.Module):
        """The same map of inputs that are normalised already."""

        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.weight, self.bias = (nn.Parameter(p.detach().clone()) for p in model[0].parameters())
            self.head = model[2]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.weight * x + self.bias))

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    x, y = draw(8, 3) * torch.arange(1, 9)[:, None], torch.arange(8) % 3
    normal = nn.functional.batch_norm(x, None, None, training=True)[:4]
    twin = ng.kronecker_fisher(Affine(model), ng.Categorical(), normal, expectation=expectation, y=y[:4])
    pre = ng.Preconditioner(model, ng.Categorical(), expectation=expectation, periods=ng.Renewal(1, (), 1, rows=0.5))
    if how == "update":
        pre.update(x, y)
    z = model(x)
    pre.observe(z, y) if how == "observe" else None
    ng.Categorical().nll(z, y).backward()
    pre.step()
    found = pre._running.factors["0"].to_dense()
    torch.testing.assert_close(found.diagonal(), twin.to_dense().diagonal()[:6])
