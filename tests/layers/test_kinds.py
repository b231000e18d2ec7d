"""Embeddings, normalisation, attention, bare parameters: against definitions by differentiation."""

from typing import Any

import pytest
import torch
from oracles.layers import diagonal, draw, softmax_fisher
from torch import Tensor, nn

import natgrad as ng

VOCABULARY = 7


class Tokens(nn.Module):
    """Embedding, tanh, mean over positions, linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 3, **options), nn.Linear(3, 4)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)).mean(1))


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding: int | None) -> None:
    """A = counts / N, kept as a vector; G averages g gᵀ over the tokens that are no padding."""
    model = Tokens(padding_idx=padding)
    ids = torch.tensor([[0, 2, 2, 5], [1, 1, 2, 0], [6, 3, 3, 2]])
    k = ng.kronecker_fisher(model, ng.Categorical(), ids)
    counts, G, rows = torch.zeros(VOCABULARY, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64), 0
    for n in range(3):
        s = model.embedding(ids[n])
        z = model.head(torch.tanh(s).mean(0))
        F = softmax_fisher(z.detach())
        J = torch.stack([torch.autograd.grad(value, s, retain_graph=True)[0] for value in z])
        for t in range(4):
            if ids[n, t] != padding:
                counts[ids[n, t]] += 1 / 3
                G, rows = G + J[:, t].T @ F @ J[:, t], rows + 1
    A = k.factors["embedding"].A
    assert isinstance(A, ng.curvature.base.Diagonal)
    torch.testing.assert_close(A.vector, counts)
    torch.testing.assert_close(k.factors["embedding"].G, G / rows)
    block = torch.kron(G / rows, torch.diag(counts))  # W is stored [vocabulary, dim]; columns of Wᵀ stacked
    order = torch.arange(VOCABULARY * 3).view(3, VOCABULARY).T.reshape(-1)
    dense = k.to_dense()[: VOCABULARY * 3, : VOCABULARY * 3]
    torch.testing.assert_close(dense, block[order][:, order])
    for kind in ("exact", "factored"):
        inverse = k.inverse(0.2, kind=kind)
        v = draw(k.shape[0], 2)
        torch.testing.assert_close(inverse @ v, inverse.to_dense() @ v)
    exact = k.inverse(0.2, kind="exact")
    torch.testing.assert_close(exact @ (k @ v + 0.2 * v), v)


def test_embedding_of_one_token_per_example_is_exact() -> None:
    """One example alone: the block is the Fisher matrix itself."""
    model, ids = Tokens(), torch.tensor([[3]])
    block = ng.kronecker_fisher(model, ng.Categorical(), ids).to_dense()[:21, :21]
    torch.testing.assert_close(block, ng.Fisher(model, ng.Categorical(), ids).to_dense()[:21, :21])


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"embedding\.weight \(Embedding with {next(iter(options))}"):
        ng.kronecker_fisher(Tokens(**options), ng.Categorical(), torch.zeros(2, 3, dtype=torch.long))


NORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((3, 2)), (2, 3, 2)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group norm 2d": (lambda: nn.GroupNorm(2, 4), (4, 2, 2)),
    "batch norm, eval": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "batch norm 2d, eval": (lambda: nn.BatchNorm2d(3).eval(), (3, 2, 2)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 2, 2)),
}


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.head = norm, nn.Linear(torch.Size(shape).numel(), 3)
        for p in norm.parameters():
            nn.init.normal_(p)
        for name, buffer in norm.named_buffers():
            if name.startswith("running"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x)).flatten(1))


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("name", NORMS)
def test_normalisation_has_the_diagonal_of_the_fisher_matrix(name: str, expectation: str) -> None:
    norm, shape = NORMS[name]
    model, x, y = Normed(norm(), shape), draw(5, *shape), torch.tensor([0, 1, 2, 1, 1])
    k = ng.kronecker_fisher(model, ng.Categorical(), x, expectation=expectation, y=y)
    exact = ng.Fisher if expectation == "exact" else ng.EmpiricalFisher
    given = (model, ng.Categorical(), x) if expectation == "exact" else (model, ng.Categorical(), x, y)
    size = sum(p.numel() for p in model.norm.parameters())
    expected = exact(*given).to_dense().diagonal()[:size]
    torch.testing.assert_close(k.to_dense()[:size, :size], torch.diag(expected))
    for kind in ("exact", "factored"):  # a diagonal is damped exactly in both
        inverse = k.inverse(0.1, kind=kind).to_dense()[:size, :size]
        torch.testing.assert_close(inverse, torch.diag(1 / (expected + 0.1)))


def test_batch_norm_in_training_mode_is_the_fisher_matrix_of_the_batch() -> None:
    """The examples depend on each other: the exact expectation takes their scores apart."""
    model, x = Normed(nn.BatchNorm2d(3), (3, 2, 2)), draw(4, 3, 2, 2)
    before = model.norm.running_mean.clone()
    k = ng.kronecker_fisher(model, ng.Categorical(), x)
    assert torch.equal(model.norm.running_mean, before)
    J = torch.autograd.functional.jacobian(
        lambda w, b: torch.func.functional_call(
            model, {"norm.weight": w, "norm.bias": b, "norm.running_mean": before.clone()}, (x,)
        ),
        (model.norm.weight.detach(), model.norm.bias.detach()),
    )
    J = torch.cat(J, dim=2)  # [example, output, parameter]
    F = torch.stack([softmax_fisher(z) for z in model(x).detach()])
    expected = torch.einsum("nop,noq,nqp->p", J, F, J) / 4
    torch.testing.assert_close(k.to_dense()[:6, :6], torch.diag(expected))


class Own(nn.Module):
    """Parameters of its own, used as it likes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.randn(4))
        self.shift = nn.Parameter(torch.randn(2, 2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.gain * self.first(x)) + self.shift.flatten() ** 2)


@pytest.mark.parametrize("split", [[20], [3, 17]])
def test_bare_parameters_have_the_diagonal_of_the_fisher_matrix(split: list[int]) -> None:
    model, x = Own(), draw(20, 3)
    expected = diagonal(model, [model.gain, model.shift], x, softmax_fisher)
    k = ng.kronecker_fisher(model, ng.Categorical(), list(x.split(split)))
    torch.testing.assert_close(k.factors["gain"].to_dense().diagonal(), expected[:4])
    torch.testing.assert_close(k.factors["shift"].to_dense().diagonal(), expected[4:])
    y = torch.arange(20) % 3
    k = ng.kronecker_fisher(model, ng.Categorical(), x, expectation="empirical", y=y)
    full = ng.EmpiricalFisher(model, ng.Categorical(), x, y).to_dense().diagonal()
    torch.testing.assert_close(k.to_dense().diagonal()[:8], full[:8])


def test_bare_parameters_are_estimated_without_bias_from_sampled_targets() -> None:
    model, x = Own(), draw(6, 3)
    expected = ng.Fisher(model, ng.Gaussian(), x).to_dense().diagonal()[:4]
    generator = torch.Generator().manual_seed(0)
    k = ng.kronecker_fisher(model, ng.Gaussian(), x, expectation="sampled", samples=6000, generator=generator)
    torch.testing.assert_close(k.factors["gain"].to_dense().diagonal(), expected, rtol=0.1, atol=0.0)


class Unlayered(nn.Module):
    """Parameters of its own and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.last


@pytest.mark.parametrize("how", ["observe", "update", "micro-batches"])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_a_model_of_bare_parameters_alone(expectation: str, how: str) -> None:
    model, x, y = Unlayered(), draw(8, 3), torch.arange(8) % 3
    pre = ng.Preconditioner(model, ng.Categorical(), expectation=expectation, damping=0.1, scaling=None)
    for xs, ys in zip(x.split(3), y.split(3), strict=True) if how == "micro-batches" else [(x, y)]:
        pre.update(xs, ys) if how == "update" else None
        z = model(xs)
        pre.observe(z, ys) if how != "update" else None
        ng.Categorical("none").nll(z, ys).div(8).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    pre.step()
    twin = ng.Fisher(model, ng.Categorical(), x) if expectation == "exact" else None
    twin = twin or ng.EmpiricalFisher(model, ng.Categorical(), x, y)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, plain / (twin.to_dense().diagonal() + 0.1))
    ng.KFAC(model, ng.Categorical()).step(x, y)


class Attending(nn.Module):
    def __init__(self, cross: str = "self", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 3)
        self.cross = cross
        for p in self.parameters():
            nn.init.normal_(p)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        key = x if self.cross == "self" else x[:, :3] * 2
        value = key if self.cross != "three" else key + 1
        return self.head(self.attention(x, key, value, need_weights=False)[0].sum(1))


class Written(nn.Module):
    """The same attention from linear layers."""

    def __init__(self, model: Attending) -> None:
        super().__init__()
        bias = model.attention.in_proj_bias is not None
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4, bias=bias).double() for _ in range(4))
        self.head, self.cross = model.head, model.cross
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data = model.attention.in_proj_weight.data[4 * i : 4 * i + 4].clone()
            if bias:
                layer.bias.data = model.attention.in_proj_bias.data[4 * i : 4 * i + 4].clone()
        self.out.load_state_dict(model.attention.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        key = x if self.cross == "self" else x[:, :3] * 2
        value = key if self.cross != "three" else key + 1
        q, k, v = (f(t).unflatten(2, (2, 2)).transpose(1, 2) for f, t in ((self.q, x), (self.k, key), (self.v, value)))
        mixed = (q @ k.mT / 2**0.5).softmax(-1) @ v
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)).sum(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", ["self", "two", "three"])
def test_attention_has_the_factors_of_its_linear_layers(cross: str, bias: bool, sharing: str) -> None:
    model = Attending(cross, bias=bias)
    twin, x = Written(model), draw(3, 5, 4)
    torch.testing.assert_close(model(x), twin(x))
    found = ng.kronecker_fisher(model, ng.Categorical(), x, sharing=sharing).factors
    expected = ng.kronecker_fisher(twin, ng.Categorical(), x, sharing=sharing).factors
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(found["attention.in_proj"].A[i], expected[name].A)
        torch.testing.assert_close(found["attention.in_proj"].G[i], expected[name].G)
    torch.testing.assert_close(found["attention.out_proj"].A, expected["out"].A)
    torch.testing.assert_close(found["attention.out_proj"].G, expected["out"].G)
    torch.testing.assert_close(found["head"].to_dense(), expected["head"].to_dense())


def test_attention_is_left_as_it_was() -> None:
    model, plain, x = Attending(dropout=0.5), Attending(dropout=0.5), draw(3, 5, 4)
    pre = ng.Preconditioner(model, ng.Categorical())
    torch.manual_seed(3)
    z = model(x)
    pre.observe(z)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(plain(x), z)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(AssertionError):
        model(draw(3, 5, 2))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert model(x).shape == (3, 3)
    cover = str(pre.coverage())
    assert "attention.in_proj" in cover and "3 of 5 x 4" in cover


@pytest.mark.parametrize(("layer", "name"), [(nn.EmbeddingBag(5, 2), "EmbeddingBag, which sums")])
def test_layers_without_factors_are_named(layer: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ng.Preconditioner(nn.ModuleList([layer, nn.Linear(2, 2)]), ng.Gaussian())
