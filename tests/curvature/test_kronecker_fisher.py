"""Every structure, expectation and normaliser of `kronecker_fisher` against dense twins built by loops."""

import math

import pytest
import torch
from curvature import oracle
from curvature.oracle import Net
from torch import nn

from natgrad.curvature import kronecker_fisher
from natgrad.curvature.base import Diagonal, to_dense
from natgrad.damping import ExactTikhonov, FactoredTikhonov
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian
from natgrad.model_view import ModelView

NETS = {
    "one layer": lambda: (Net([3, 2]), (5, 3)),
    "two layers": lambda: (Net([3, 4, 2]), (6, 3)),
    "three layers": lambda: (Net([2, 3, 3, 3]), (4, 2)),
    "no bias": lambda: (Net([3, 3, 2], bias=False), (5, 3)),
    "sequence": lambda: (Net([2, 3, 2]), (4, 3, 2)),
    "mixed sequence": lambda: (Net([2, 2, 2], mix=True), (3, 3, 2)),
    "grid": lambda: (Net([2, 2]), (2, 2, 2, 2)),
    "batch of one": lambda: (Net([3, 2, 2]), (1, 3)),
}
LIKELIHOODS = {
    "gaussian": lambda n: Gaussian(variance=0.3, normalizer=n),
    "bernoulli": lambda n: Bernoulli(normalizer=n),
    "categorical": lambda n: Categorical(normalizer=n),
}
TWINS = {"block_diagonal": oracle.block_diagonal, "full": oracle.full, "exact_block": oracle.exact_block}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(likelihood, z):
    if isinstance(likelihood, Categorical):
        return torch.arange(z[..., 0].numel()).reshape(z.shape[:-1]) % z.shape[-1]
    if isinstance(likelihood, Bernoulli):
        return draw(*z.shape, seed=5).sigmoid()
    return draw(*z.shape, seed=5)


@pytest.fixture(params=NETS)
def problem(request):
    net, shape = NETS[request.param]()
    return net, draw(*shape)


@pytest.mark.parametrize("structure", TWINS)
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_dense_twin(problem, name, structure, expectation):
    net, x = problem
    likelihood = LIKELIHOODS[name]("example")
    y = targets(likelihood, net(x)) if expectation == "empirical" else None
    k = kronecker_fisher(net, likelihood, x, structure=structure, expectation=expectation, y=y)
    torch.testing.assert_close(k.to_dense(order="vec"), TWINS[structure](net, likelihood, x, y))


@pytest.mark.parametrize("normalizer", ["element", "none"])
@pytest.mark.parametrize("structure", TWINS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_normalizers(name, structure, normalizer):
    net, x = Net([2, 3, 2]), draw(4, 3, 2)
    likelihood = LIKELIHOODS[name](normalizer)
    k = kronecker_fisher(net, likelihood, x, structure=structure, expectation="exact")
    torch.testing.assert_close(k.to_dense(order="vec"), TWINS[structure](net, likelihood, x))
    split = kronecker_fisher(net, likelihood, list(x.split([1, 3])), structure=structure, expectation="exact")
    torch.testing.assert_close(split.to_dense(), k.to_dense())


def test_input_covariance(problem):
    net, x = problem
    k = kronecker_fisher(net, Gaussian(), x, structure="input_covariance", expectation="exact", alpha=0.7)
    twin = oracle.input_covariance(net, Gaussian(), x, 0.7)
    torch.testing.assert_close(k.to_dense(order="vec"), twin)
    eye = torch.eye(len(twin), dtype=twin.dtype)
    torch.testing.assert_close(k.inverse(0.2).to_dense(order="vec") @ (twin + 0.2 * eye), eye)
    with pytest.raises(ValueError, match="kind='exact'"):
        k.inverse(0.2, kind="factored")


@pytest.mark.parametrize("structure", [*TWINS, "input_covariance"])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_any_split_gives_the_same(structure, expectation):
    net, x = Net([3, 4, 2]), draw(7, 3)
    likelihood = Categorical()
    y = targets(likelihood, net(x))
    whole = kronecker_fisher(net, likelihood, x, structure=structure, expectation=expectation, y=y)
    for split in ([7], [1, 6], [3, 2, 2], [1] * 7):
        batches, ys = list(x.split(split)), list(y.split(split))
        parts = kronecker_fisher(net, likelihood, batches, structure=structure, expectation=expectation, y=ys)
        torch.testing.assert_close(parts.to_dense(), whole.to_dense())


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("structure", TWINS)
def test_sampled_error_falls_as_the_root_of_the_samples(name, structure):
    net, x = Net([2, 3, 2]), draw(3, 2)
    likelihood = LIKELIHOODS[name]("example")
    exact = kronecker_fisher(net, likelihood, x, structure=structure, expectation="exact").to_dense()
    counts, errors = [4, 16, 64, 256], []
    for samples in counts:
        squares = []
        for seed in range(16):
            generator = torch.Generator().manual_seed(100 * samples + seed)
            k = kronecker_fisher(
                net, likelihood, x, structure=structure, expectation="sampled", samples=samples, generator=generator
            )
            squares.append((k.to_dense() - exact).square().sum())
        errors.append(torch.stack(squares).mean().sqrt())
    logs = torch.tensor(counts, dtype=torch.float64).log()
    slope = ((logs - logs.mean()) * torch.stack(errors).log()).sum() / (logs - logs.mean()).square().sum()
    assert abs(slope + 0.5) < 0.1
    assert errors[-1] < 0.3 * exact.norm()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_expectation_equals_enumeration_of_targets(name):
    """Type 1 by brute force: the score of every possible y, weighted by its probability."""
    if name == "gaussian":
        pytest.skip("its targets cannot be enumerated")
    net, x = Net([2, 3, 2]), draw(3, 2)
    likelihood = LIKELIHOODS[name]("example")
    k = kronecker_fisher(net, likelihood, x, structure="block_diagonal", expectation="exact")
    z = net(x).detach()
    twin = 0.0
    if name == "categorical":
        possible = [torch.tensor([i] * 3) for i in range(2)]
        chances = [z.softmax(-1)[:, i] for i in range(2)]
    else:
        p = z.sigmoid()
        pairs = [torch.tensor([i, j], dtype=torch.float64).expand(3, 2) for i in (0, 1) for j in (0, 1)]
        possible = pairs
        chances = [(y * p + (1 - y) * (1 - p)).prod(-1) for y in pairs]
    G = [0.0, 0.0]
    for y, chance in zip(possible, chances, strict=True):
        for n in range(3):
            parts = [oracle.examples(net, likelihood, x[n : n + 1], y[n : n + 1])[0]]
            for i in range(2):
                J = parts[0].J[i][:, 0]
                G[i] = G[i] + chance[n] * J.T @ parts[0].F @ J / 3
    twin = torch.block_diag(*(torch.kron(oracle.factor(net, likelihood, x, i, i)[0], G[i]) for i in range(2)))
    torch.testing.assert_close(k.to_dense(order="vec"), twin)


@pytest.mark.parametrize("structure", TWINS)
def test_one_linear_layer_with_gaussian_noise_is_exact(structure):
    net, x = Net([3, 2]), draw(6, 3)
    y = draw(6, 2, seed=1)
    k = kronecker_fisher(net, Gaussian(0.5), x, structure=structure, expectation="exact")
    names = [name for name, _ in net.named_parameters()]

    def loss(flat):
        parts = dict(zip(names, (flat[:6].reshape(2, 3), flat[6:]), strict=True))
        z = torch.func.functional_call(net, parts, (x,))
        return 0.5 * (z - y).square().sum() / 0.5 / 6

    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.testing.assert_close(k.to_dense(), torch.autograd.functional.hessian(loss, flat))


@pytest.mark.parametrize("structure", ["block_diagonal", "full", "exact_block"])
def test_orders_products_and_dicts(structure):
    net, x = Net([3, 4, 2]), draw(6, 3)
    k = kronecker_fisher(net, Bernoulli(), x, structure=structure, expectation="exact")
    dense, view = k.to_dense(), ModelView(net)
    v = draw(view.num_parameters, 3, seed=2)
    torch.testing.assert_close(k @ v, dense @ v)
    torch.testing.assert_close(k @ v[:, 0], dense @ v[:, 0])
    torch.testing.assert_close(view.to_vector(k @ view.to_dict(v[:, 0])), dense @ v[:, 0])
    torch.testing.assert_close(k.quadratic_form(v[:, 0]), v[:, 0] @ dense @ v[:, 0])
    torch.testing.assert_close(k.T.to_dense(), dense.T)
    # vec(V) = columns of [W b]: (A ⊗ G) vec(V) = vec(G V A)
    if structure == "block_diagonal":
        f, d = k.factors["layers.0"], view.to_dict(v[:, 0])
        V = torch.cat([d["layers.0.weight"], d["layers.0.bias"][:, None]], dim=1)
        found = k @ d
        expected = to_dense(f.G) @ V @ to_dense(f.A)
        torch.testing.assert_close(found["layers.0.weight"], expected[:, :3])
        torch.testing.assert_close(found["layers.0.bias"], expected[:, 3])


def test_factors_hold_the_homogeneous_coordinate_last_and_the_known_output():
    net, x = Net([3, 4, 2]), draw(6, 3)
    k = kronecker_fisher(net, Bernoulli(), x, expectation="exact")
    A = k.factors["layers.0"].A.to_dense()
    torch.testing.assert_close(A[:3, 3], x.mean(0))
    assert A[3, 3] == 1
    assert isinstance(k.factors["layers.1"].G, Diagonal)
    p = net(x).sigmoid().detach()
    torch.testing.assert_close(k.factors["layers.1"].G.to_dense(), torch.diag((p * (1 - p)).mean(0)))
    full = kronecker_fisher(net, Bernoulli(), x, structure="full", expectation="exact")
    for name, f in k.factors.items():
        torch.testing.assert_close(full.factors[name].A.to_dense(), f.A.to_dense())
        torch.testing.assert_close(full.factors[name].G.to_dense(), f.G.to_dense())


@pytest.mark.parametrize(
    "kind",
    ["exact", ExactTikhonov(), "factored", None, *(FactoredTikhonov(n) for n in ("frobenius", "spectral", "one"))],
)
@pytest.mark.parametrize("name", ["gaussian", "categorical"])
def test_inverses(problem, name, kind):
    net, x = problem
    likelihood, damping = LIKELIHOODS[name]("example"), 0.04
    k = kronecker_fisher(net, likelihood, x, structure="block_diagonal", expectation="exact")
    blocks = []
    for i in range(len(net.layers)):
        A, G = oracle.factor(net, likelihood, x, i, i)
        I_A, I_G = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
        if kind in ("exact", ExactTikhonov()):
            damped = torch.kron(A, G) + damping * torch.kron(I_A, I_G)
        else:
            norms = {
                "trace": lambda M: M.trace() / len(M),
                "frobenius": lambda M: M.norm() / math.sqrt(len(M)),
                "spectral": lambda M: torch.linalg.matrix_norm(M, 2),
                "one": lambda M: torch.ones((), dtype=M.dtype),
            }
            norm = norms[kind.pi if isinstance(kind, FactoredTikhonov) else "trace"]
            pi = (norm(A) / norm(G)).sqrt()
            gamma = math.sqrt(damping)
            damped = torch.kron(A + pi * gamma * I_A, G + gamma / pi * I_G)
        blocks.append(torch.linalg.inv(damped))
    inverse = k.inverse(damping=damping, kind=kind)
    twin = torch.block_diag(*blocks)
    torch.testing.assert_close(inverse.to_dense(order="vec"), twin)
    v = draw(len(twin), 2, seed=3)
    torch.testing.assert_close(inverse @ v, inverse.to_dense() @ v)


@pytest.mark.parametrize("structure", ["full", "exact_block"])
def test_dense_inverses(structure):
    net, x = Net([3, 4, 2]), draw(5, 3)
    k = kronecker_fisher(net, Categorical(), x, structure=structure, expectation="exact")
    eye = torch.eye(k.shape[0], dtype=torch.float64)
    torch.testing.assert_close(k.inverse(0.1).to_dense(), torch.linalg.inv(k.to_dense() + 0.1 * eye))
    torch.testing.assert_close(k.inverse(0.1, kind="exact").to_dense(), k.inverse(0.1).to_dense())
    with pytest.raises(ValueError, match="kind='exact'"):
        k.inverse(0.1, kind="factored")


@pytest.mark.parametrize("structure", [*TWINS, "input_covariance"])
def test_undamped_inverse_of_a_singular_matrix_proposes_a_damping(structure):
    net, x = Net([3, 2, 2]), draw(8, 3)
    x[:, 1] = 0  # a dead input
    k = kronecker_fisher(net, Gaussian(), x, structure=structure, expectation="exact")
    with pytest.raises(ValueError, match="singular.*damping") as error:
        k.inverse(0.0)
    proposal = float(str(error.value).replace("damping=", " ").split()[-1])
    k.inverse(proposal)
    with pytest.raises(ValueError, match="damping=-1"):
        k.inverse(-1.0)


def test_undamped_inverse_of_a_regular_matrix():
    net, x = Net([3, 2]), draw(8, 3)
    k = kronecker_fisher(net, Gaussian(), x, expectation="exact")
    for kind in ("factored", "exact"):
        torch.testing.assert_close(k.inverse(kind=kind).to_dense(), torch.linalg.inv(k.to_dense()))


def test_what_is_no_likelihood_is_refused() -> None:
    with pytest.raises(TypeError, match="likelihood: expected an object like .*MSELoss, which lacks nll"):
        kronecker_fisher(nn.Linear(3, 2), nn.MSELoss(), torch.ones(4, 3))
