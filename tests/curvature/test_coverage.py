"""Uncovered, frozen and tied parameters; what bad input gets."""

import pytest
import torch
from curvature.oracle import Net
from torch import nn

from natgrad.curvature import kronecker_fisher
from natgrad.layers.coverage import cover
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian
from natgrad.model_view import ModelView
from natgrad.operators.autodiff import Fisher


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def bilinear():
    """A kind without a rule between two linear layers."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.mixed, self.last = nn.Linear(3, 4), nn.Bilinear(4, 4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.mixed(x, x))

    return Model().double()


def test_uncovered_parameters_are_named():
    with pytest.raises(ValueError, match=r"mixed\.weight \(Bilinear\), mixed\.bias \(Bil.*uncovered='identity'"):
        kronecker_fisher(bilinear(), Gaussian(), draw(5, 3))
    with pytest.raises(ValueError, match=r"1\.weight \(LayerNorm, which structure 'full' does not cover\)"):
        kronecker_fisher(normed(), Gaussian(), draw(5, 3), structure="full")
    with pytest.raises(ValueError, match=r"LayerNorm, which .*'block_tridiagonal'.*use structure='block_diagonal'"):
        kronecker_fisher(normed(), Gaussian(), draw(5, 3), structure="block_tridiagonal")
    with pytest.raises(ValueError, match="uncovered='no'"):
        kronecker_fisher(normed(), Gaussian(), draw(5, 3), uncovered="no")


@pytest.mark.parametrize("structure", ["block_diagonal", "full", "exact_block", "input_covariance"])
def test_identity_block(structure):
    model, x = bilinear(), draw(5, 3)
    k = kronecker_fisher(model, Gaussian(), x, structure=structure, uncovered="identity")
    dense = k.to_dense()
    block = slice(16, 84)  # after 4 x 3 weights and 4 biases of the first layer
    torch.testing.assert_close(dense[block, block], torch.eye(68, dtype=torch.float64))
    assert dense[block, :16].abs().max() == 0 == dense[block, 84:].abs().max()
    inverse = k.inverse(0.25, kind="exact").to_dense()
    torch.testing.assert_close(inverse, torch.linalg.inv(dense + 0.25 * torch.eye(len(dense), dtype=torch.float64)))
    vec = k.to_dense(order="vec")
    torch.testing.assert_close(vec[-68:, -68:], torch.eye(68, dtype=torch.float64))


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("split", [None, [20, 13]])
def test_diagonal_block(expectation, split):
    """Σ_n diag(J_nᵀ F_R J_n) / count over more examples than are differentiated at once."""
    model, x = normed(), draw(33, 3)
    y = torch.arange(33) % 2
    xs, ys = (x, y) if split is None else (list(x.split(split)), list(y.split(split)))
    k = kronecker_fisher(model, Categorical(), xs, expectation=expectation, y=ys, uncovered="diagonal")
    twin = torch.zeros(8, dtype=torch.float64)
    parameters = [model[1].weight, model[1].bias]
    for n in range(33):
        z = model(x[n : n + 1])[0]
        p = z.softmax(0).detach()
        J = torch.stack([torch.cat(torch.autograd.grad(s, parameters, retain_graph=True)) for s in z])
        u = p - torch.eye(2, dtype=torch.float64)[y[n]]
        F = torch.diag(p) - torch.outer(p, p) if expectation == "exact" else torch.outer(u, u)
        twin += (J.T @ F @ J).diagonal() / 33
    torch.testing.assert_close(k.to_dense()[16:24, 16:24], torch.diag(twin))
    torch.testing.assert_close(k.inverse(0.1).to_dense()[16:24, 16:24], torch.diag(1 / (twin + 0.1)))


def test_diagonal_of_a_batch_normalised_model():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    x, mean = draw(6, 3), model[1].running_mean.clone()
    k = kronecker_fisher(model, Gaussian(), x, uncovered="diagonal")
    assert torch.equal(model[1].running_mean, mean) and model[1].num_batches_tracked == 0
    jac = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(
            model, {"1.weight": w, "1.running_mean": mean.clone(), "1.running_var": mean.clone()}, (x,)
        ),
        model[1].weight.detach(),
    )
    torch.testing.assert_close(k.to_dense()[8:10, 8:10], torch.diag(jac.square().sum((0, 1)) / 6))


def test_table():
    text = str(kronecker_fisher(bilinear(), Gaussian(), draw(5, 3), uncovered="identity").coverage())
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["first", "Kronecker", "4", "x", "4", "16"]
    assert lines[1] == ["last", "Kronecker", "5", "x", "2", "10"]
    assert lines[2] == ["mixed.weight", "identity", "(Bilinear)", "64"]
    assert lines[-1] == ["total", "26", "covered,", "68", "not", "94"]


@pytest.mark.parametrize("structure", ["block_diagonal", "full", "exact_block"])
def test_frozen_bias_and_frozen_weight(structure):
    """A block holds what is trained: the rows and columns of the whole block that belong to it."""
    net, x = Net([3, 4, 2]), draw(5, 3)
    everything = kronecker_fisher(net, Bernoulli(), x, structure=structure, expectation="exact").to_dense()
    net.layers[0].bias.requires_grad_(False)
    net.layers[1].weight.requires_grad_(False)
    kept = torch.tensor([*range(12), *range(24, 26)])
    k = kronecker_fisher(net, Bernoulli(), x, structure=structure, expectation="exact")
    torch.testing.assert_close(k.to_dense(), everything[kept[:, None], kept])
    eye = torch.eye(14, dtype=torch.float64)
    torch.testing.assert_close(k.inverse(0.1, kind="exact").to_dense(), torch.linalg.inv(k.to_dense() + 0.1 * eye))


def test_frozen_layers_below_and_above():
    net, x = Net([3, 4, 3, 2]), draw(5, 3)
    everything = kronecker_fisher(net, Bernoulli(), x).to_dense()
    net.layers[0].requires_grad_(False)
    net.layers[2].requires_grad_(False)
    k = kronecker_fisher(net, Bernoulli(), x)
    assert set(k.factors) == {"layers.1"}
    torch.testing.assert_close(k.to_dense(), everything[16:31, 16:31])


class Tied(nn.Module):
    """Two layers with one weight and biases of their own; or with weights of their own."""

    def __init__(self, kind, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv = kind == "convolution"
        make = (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2)) if self.conv else (lambda: nn.Linear(4, 4))
        self.one, self.two, self.head = make(), make(), nn.Linear(4, 3)
        self.two.weight = self.one.weight if tied else nn.Parameter(self.one.weight.detach().clone())
        self.double()

    def forward(self, x):
        h = torch.tanh(self.two(torch.tanh(self.one(x[..., None].expand(-1, -1, 5) if self.conv else x))))
        return self.head(h.mean(2) if self.conv else h)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_weight_that_two_layers_share_is_one_block(kind):
    """Σ a aᵀ over both, the mean of g gᵀ; the biases, which they do not share, have their diagonals."""
    model, x = Tied(kind), draw(5, 4)
    k = kronecker_fisher(model, Categorical(), x)
    found, apart = k.factors, kronecker_fisher(Tied(kind, tied=False), Categorical(), x).factors
    assert list(found) == ["one", "one.bias", "two.bias", "head"]
    A = [apart[name].A[..., :-1, :-1] for name in ("one", "two")]  # without the homogeneous coordinate
    torch.testing.assert_close(found["one"].A, A[0] + A[1])
    torch.testing.assert_close(found["one"].G, (apart["one"].G + apart["two"].G) / 2)
    torch.testing.assert_close(found["head"].to_dense(), apart["head"].to_dense())
    exact = Fisher(model, Categorical(), x).to_dense().diagonal()
    size = model.one.weight.numel()
    biases = torch.cat([found[f"{name}.bias"].to_dense().diagonal() for name in ("one", "two")])
    torch.testing.assert_close(biases, exact[size : size + 8])


def test_other_structures_have_no_block_for_a_weight_that_two_layers_share():
    model, x = Tied("linear"), draw(4, 4)
    for structure in ("full", "exact_block", "block_tridiagonal", "input_covariance"):
        with pytest.raises(ValueError, match=r"one\.weight \(Linear, shared with another module\)"):
            kronecker_fisher(model, Gaussian(), x, structure=structure)
    k = kronecker_fisher(model, Gaussian(), x, structure="exact_block", uncovered="diagonal")
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"one.weight": w}, (x,)), model.one.weight.detach()
    )
    torch.testing.assert_close(k.to_dense().diagonal()[:16], J.square().sum((0, 1)).reshape(-1) / 4)


def test_one_module_under_two_names_is_a_module_called_twice():
    layer = nn.Linear(2, 2).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    coverage = cover(ModelView(model))
    assert list(coverage.layers) == ["0"] and coverage.members == {"0": ("0.weight", "0.bias")}


def test_what_looks_like_a_covered_layer_and_is_not():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0] * 2

    attention = Attention(4, 2)
    found = cover(ModelView(nn.ModuleDict({"own": Own(2, 2), "attention": attention})), uncovered="identity")
    assert not found.layers
    assert found.reasons["own.weight"] == "Own with a forward of its own"
    assert found.reasons["attention.out_proj.weight"].endswith("inside MultiheadAttention")
    wrapped = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    found = cover(ModelView(nn.Sequential(wrapped)), uncovered="identity")
    assert not found.layers and len(found.uncovered) == 3


def test_layer_that_is_used_without_being_called_is_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)

    with pytest.raises(ValueError, match="layer 'fc'.*without calling it"):
        kronecker_fisher(Functional().double(), Gaussian(), draw(4, 3))


def test_layer_that_is_not_used_has_a_zero_block():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x)

    k = kronecker_fisher(Idle().double(), Gaussian(), draw(4, 3))
    assert k.to_dense()[8:, 8:].abs().max() == 0
    for kind in ("factored", "exact"):
        torch.testing.assert_close(k.inverse(0.5, kind=kind).to_dense()[8:, 8:], 2 * torch.eye(8, dtype=torch.float64))


def test_bad_input():
    net, x = Net([3, 2]), draw(4, 3)
    fisher = kronecker_fisher
    with pytest.raises(ValueError, match="structure='diagonal'.*'block_diagonal'"):
        fisher(net, Gaussian(), x, structure="diagonal")
    with pytest.raises(ValueError, match="expectation='type2'.*'sampled'"):
        fisher(net, Gaussian(), x, expectation="type2")
    with pytest.raises(ValueError, match="'empirical' needs the training targets: pass y="):
        fisher(net, Gaussian(), x, expectation="empirical")
    with pytest.raises(ValueError, match="samples=0"):
        fisher(net, Gaussian(), x, expectation="sampled", samples=0)
    with pytest.raises(ValueError, match="alpha=0"):
        fisher(net, Gaussian(), x, structure="input_covariance", alpha=0)
    with pytest.raises(ValueError, match="empty"):
        fisher(net, Gaussian(), x[:0])
    with pytest.raises(ValueError, match="without a batch"):
        fisher(net, Gaussian(), [])
    with pytest.raises(TypeError, match="re-iterable"):
        fisher(net, Gaussian(), iter([x]))
    with pytest.raises(ValueError, match="fewer batches than x"):
        fisher(net, Gaussian(), [x, x], expectation="empirical", y=[draw(4, 2)])
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError, match="layers.0.*not all finite"):
            fisher(net, Gaussian(), broken)
    with pytest.raises(ValueError, match="kind='cholesky'"):
        fisher(net, Gaussian(), x).inverse(0.1, kind="cholesky")


def test_mapping_tuple_and_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, shift):
            return {"z": self.fc(x + shift)}

    model, x, shift = Two().double(), draw(4, 3), draw(4, 3, seed=1)
    expected = kronecker_fisher(model.fc, Gaussian(), x + shift).to_dense()
    for inputs, forward in (
        ((x, shift), lambda m, i: m(*i)["z"]),
        ({"x": x, "shift": shift}, lambda m, i: m(**i)["z"]),
        ([(x[:1], shift[:1]), (x[1:], shift[1:])], lambda m, i: m(*i)["z"]),
    ):
        torch.testing.assert_close(kronecker_fisher(model, Gaussian(), inputs, forward=forward).to_dense(), expected)
    with pytest.raises(TypeError, match="forward"):
        kronecker_fisher(model, Gaussian(), (x, shift))


def test_another_structure_is_proposed_only_where_it_would_help() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    net[2].weight = net[0].weight  # and biases of their own: no structure has a factor for these
    with pytest.raises(ValueError, match="shared with another module") as refused:
        kronecker_fisher(net, Gaussian(), torch.ones(4, 2).double(), structure="block_tridiagonal")
    assert "block_diagonal" not in str(refused.value)
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match="which structure 'block_tridiagonal' does not cover.*use structure='block_di"):
        kronecker_fisher(net, Gaussian(), torch.ones(4, 1, 2, 2).double(), structure="block_tridiagonal")
