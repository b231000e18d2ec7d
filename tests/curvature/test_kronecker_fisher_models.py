"""`kronecker_fisher` on models that use layers in uncommon ways, and what it leaves alone."""

import pytest
import torch
from curvature.oracle import Net
from torch import nn

from natgrad.curvature import kronecker_fisher
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_module_used_twice():
    """A sums over the uses, G averages over them."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    model, x = Twice(), draw(4, 2)
    k = kronecker_fisher(model, Gaussian(), x, expectation="exact")
    h = torch.tanh(model.fc(x)).detach()
    ones = torch.ones(4, 1, dtype=torch.float64)
    a1, a2 = torch.cat([x, ones], 1), torch.cat([h, ones], 1)
    torch.testing.assert_close(k.factors["fc"].A.to_dense(), (a1.T @ a1 + a2.T @ a2) / 4)
    W, G = model.fc.weight.detach(), torch.zeros(2, 2, dtype=torch.float64)
    for n in range(4):
        J = W @ torch.diag(1 - h[n] ** 2)
        G += (J.T @ J + torch.eye(2, dtype=torch.float64)) / 8
    torch.testing.assert_close(k.factors["fc"].G.to_dense(), G)
    block = kronecker_fisher(model, Gaussian(), x, structure="exact_block", expectation="exact")
    jac = torch.autograd.functional.jacobian(
        lambda w, b: torch.func.functional_call(model, {"fc.weight": w, "fc.bias": b}, (x,)),
        (model.fc.weight.detach(), model.fc.bias.detach()),
    )
    J = torch.cat([jac[0].reshape(8, 4), jac[1].reshape(8, 2)], dim=1)
    torch.testing.assert_close(block.to_dense(), J.T @ J / 4)


def test_layer_on_an_input_shared_by_all_examples():
    """A hypernetwork-like layer with one row for the whole batch: sampled estimates stay unbiased."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False, dtype=torch.float64)
            self.register_buffer("code", draw(1, 2, seed=9))

        def forward(self, x):
            return x * self.fc(self.code)

    model, x = Shared(), draw(5, 2)
    k = kronecker_fisher(
        model, Gaussian(), x, expectation="sampled", samples=4000, generator=torch.Generator().manual_seed(0)
    )
    G = torch.diag(x.square().sum(0)) / 5
    torch.testing.assert_close(k.to_dense(order="vec"), torch.kron(model.code.T @ model.code, G), rtol=0.05, atol=0.12)


@pytest.mark.parametrize("structure", ["block_diagonal", "full", "exact_block"])
def test_nothing_global_moves(structure):
    net, x = Net([3, 4, 2]), draw(5, 3)
    model = nn.Sequential(net, nn.Dropout(0.5))
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with torch.no_grad():
        first = kronecker_fisher(model, Bernoulli(), x, structure=structure, expectation="sampled")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == dtype
    assert all(p.grad is None for p in model.parameters())
    assert all(not layer._forward_hooks for layer in net.layers)
    torch.testing.assert_close(
        kronecker_fisher(model, Bernoulli(), x, structure=structure, expectation="sampled").to_dense(), first.to_dense()
    )


def test_generator_makes_draws_repeatable_and_moves():
    net, x = Net([3, 4, 2]), draw(5, 3)
    generator = torch.Generator().manual_seed(0)
    one, two = (
        kronecker_fisher(net, Categorical(), x, expectation="sampled", generator=generator).to_dense() for _ in range(2)
    )
    again = kronecker_fisher(
        net, Categorical(), x, expectation="sampled", generator=generator.manual_seed(0)
    ).to_dense()
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_float32_stays_float32_and_float64_is_not_cut():
    net, x = Net([3, 4, 2]), draw(5, 3)
    exact = kronecker_fisher(net, Bernoulli(), x, expectation="exact").to_dense()
    assert exact.dtype == torch.float64
    single = kronecker_fisher(net.float(), Bernoulli(), x.float(), expectation="exact")
    assert single.to_dense().dtype == single.inverse(0.1).to_dense().dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), exact, rtol=1e-4, atol=1e-6)
    assert not torch.equal(single.to_dense().double(), exact)


@pytest.mark.parametrize("hooked", ["wrapper", "method"])
def test_compiled_model(hooked):
    net, x = Net([3, 4, 2]), draw(5, 3)
    expected = kronecker_fisher(net, Bernoulli(), x, expectation="exact").to_dense()
    if hooked == "method":
        net.compile(backend="eager")
        model = net
    else:
        model = torch.compile(net, backend="eager")
    model(x)
    k = kronecker_fisher(model, Bernoulli(), x, expectation="exact")
    torch.testing.assert_close(k.to_dense(), expected)
    assert set(k.factors) == {"layers.0", "layers.1"}
    torch._dynamo.reset()


def test_checkpointed_and_inplace_models():
    class Model(nn.Module):
        def __init__(self, inplace, recompute):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
            self.inplace, self.recompute = inplace, recompute

        def body(self, x):
            s = self.first(x)
            return self.last(torch.relu_(s) if self.inplace else torch.relu(s))

        def forward(self, x):
            if self.recompute:
                return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
            return self.body(x)

    x = draw(5, 3)
    expected = kronecker_fisher(Model(False, False), Categorical(), x, expectation="exact").to_dense()
    for options in ((True, False), (False, True), (True, True)):
        torch.testing.assert_close(
            kronecker_fisher(Model(*options), Categorical(), x, expectation="exact").to_dense(), expected
        )
