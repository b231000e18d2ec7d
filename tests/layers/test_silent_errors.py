"""What other K-FAC libraries get wrong in silence, as far as layers are concerned: each with the right number."""

from typing import Any

import pytest
import torch
from oracles.layers import draw, kronecker, softmax_fisher
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import natgrad as ng


class Net(nn.Module):
    """One layer, an activation, and a linear map."""

    def __init__(self, layer: nn.Module, activation: nn.Module, features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.activation, self.head = layer, activation, nn.Linear(features, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.layer(x)).flatten(1))


def conv_net(activation: Any = nn.Tanh, **options: Any) -> tuple[Net, Tensor]:
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 4, 3, padding=1, **options)
    return Net(layer, activation(), 36), draw(3, 4, 3, 3)


def assert_defined(net: Net, x: Tensor, twin: Net | None = None) -> None:
    """The factors are those of the definition (of a twin with the same weights)."""
    factors = ng.kronecker_fisher(net, ng.Categorical(), x).factors["layer"]
    twin = twin or net
    A, G = kronecker(twin, twin.layer, x, softmax_fisher)
    torch.testing.assert_close(factors.A, A)
    torch.testing.assert_close(factors.G, G)


def test_grouped_convolutions_have_a_block_for_each_group() -> None:
    net, x = conv_net(groups=2)
    assert_defined(net, x)
    factors = ng.kronecker_fisher(net, ng.Categorical(), x).factors["layer"]
    assert factors.A.shape == (2, 19, 19) and factors.G.shape == (2, 2, 2)
    assert (factors.A[0] - factors.A[1]).abs().max() > 0.1  # not the average over groups


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_is_not_taken_for_zeros(mode: str) -> None:
    net, x = conv_net(padding_mode=mode)
    assert_defined(net, x)
    zeros, _ = conv_net(padding_mode="zeros")
    other = ng.kronecker_fisher(zeros, ng.Categorical(), x).factors["layer"].A
    assert (ng.kronecker_fisher(net, ng.Categorical(), x).factors["layer"].A - other).abs().max() > 0.1


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardtanh])
def test_inplace_activations(activation: Any) -> None:
    net, x = conv_net(lambda: activation(inplace=True))
    assert_defined(net, x, conv_net(activation)[0])


def test_the_mean_over_positions_is_not_taken_twice() -> None:
    """A sums over positions, G is their mean: scaling both by T or S is a frequent slip."""
    net, x = conv_net()
    factors = ng.kronecker_fisher(net, ng.Categorical(), x).factors["layer"]
    assert factors.A[-1, -1] == 9  # positions per example
    assert_defined(net, x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(2, 2, 3, padding=1), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(torch.tanh(self.conv(x))).flatten(1))


class Shared(nn.Module):
    """The same as two modules with the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        twin = Twice()
        self.conv, self.second, self.head = twin.conv, nn.Conv1d(2, 2, 3, padding=1).double(), twin.head
        self.second.weight, self.second.bias = self.conv.weight, self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.conv(x))).flatten(1))


@pytest.mark.parametrize("make", [Twice, Shared])
def test_a_module_used_twice_sums_A_and_averages_G(make: Any) -> None:
    model, x = make(), draw(3, 2, 4)
    found = ng.kronecker_fisher(model, ng.Categorical(), x).factors
    assert list(found) == ["conv", "head"]

    class First(nn.Module):
        """Two separate layers with the same weights."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = Twice().conv, Twice().conv, Twice().head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(torch.tanh(self.one(x))).flatten(1))

    apart = ng.kronecker_fisher(First(), ng.Categorical(), x).factors
    torch.testing.assert_close(found["conv"].A, apart["one"].A + apart["two"].A)
    torch.testing.assert_close(found["conv"].G, (apart["one"].G + apart["two"].G) / 2)
    torch.testing.assert_close(found["head"].to_dense(), apart["head"].to_dense())


class TiedDecoder(nn.Module):
    """The embedding's weight as that of the last layer, in one of two ways."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embedding, self.functional = nn.Embedding(5, 3), functional
        self.mid = nn.Linear(3, 3)
        if not functional:
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mid(self.embedding(ids)).mean(1))
        return F.linear(h, self.embedding.weight) if self.functional else self.head(h)


@pytest.mark.parametrize("functional", [True, False])
def test_weights_used_behind_the_layers_back_are_named(functional: bool) -> None:
    model, ids = TiedDecoder(functional).double(), torch.tensor([[0, 1], [2, 4], [3, 3]])
    message = "'embedding'.*weight outside of the layer" if functional else "Embedding, shared with another module"
    with pytest.raises(ValueError, match=message):
        ng.kronecker_fisher(model, ng.Categorical(), ids)
    if functional:
        pre = ng.Preconditioner(model, ng.Categorical())
        with pytest.raises(ValueError, match=message):
            pre.observe(model(ids))
    else:
        k = ng.kronecker_fisher(model, ng.Categorical(), ids, uncovered="diagonal")
        exact = ng.Fisher(model, ng.Categorical(), ids).to_dense().diagonal()
        torch.testing.assert_close(k.to_dense().diagonal()[:15], exact[:15])


def test_an_input_changed_in_place_afterwards_is_refused() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            s = self.conv(x)
            x += 1
            return s.flatten(1)

    with pytest.raises(RuntimeError, match="'conv' was changed in place"):
        ng.kronecker_fisher(Changed().double(), ng.Gaussian(), draw(3, 2, 4))


def test_checkpointing_counts_a_convolution_once_and_refuses_the_reentrant_kind() -> None:
    net, x = conv_net()
    expected = ng.kronecker_fisher(net, ng.Categorical(), x).to_dense()

    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.net, self.reentrant = net, reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=self.reentrant)

    found = ng.kronecker_fisher(Checkpointed(False), ng.Categorical(), x).to_dense()
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=r"net\.head, net\.layer: called inside.*use_reentrant=False"):
        ng.kronecker_fisher(Checkpointed(True), ng.Categorical(), x.requires_grad_())


@pytest.mark.parametrize("made", ["before", "after"])
def test_hooks_that_change_what_a_layer_returns_are_part_of_the_model(made: str) -> None:
    net, x = conv_net()
    found = []
    for scale in (3.0, None):  # the same by a hook, and by the activation
        model = Net(net.layer, nn.Tanh() if scale else Scaled(), 36)
        pre = ng.Preconditioner(model, ng.Categorical(), expectation="exact") if made == "before" else None
        handle = model.layer.register_forward_hook(lambda module, args, out: 3 * out) if scale else None
        pre = pre or ng.Preconditioner(model, ng.Categorical(), expectation="exact")
        z = model(x)
        pre.observe(z)
        z.sum().backward()
        pre.step()
        found.append(pre._running.factors["layer"])
        handle.remove() if handle else None
    torch.testing.assert_close(found[0].A, found[1].A)
    torch.testing.assert_close(found[0].G, found[1].G)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * x)


def test_channels_last_and_half_precision() -> None:
    net, x = conv_net()
    expected = ng.kronecker_fisher(net, ng.Categorical(), x)
    other = net.to(memory_format=torch.channels_last)
    found = ng.kronecker_fisher(other, ng.Categorical(), x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    low = ng.kronecker_fisher(net.bfloat16(), ng.Categorical(), x.bfloat16()).factors["layer"]
    assert low.A.dtype == torch.float32  # sums over many rows keep their digits
    error = (low.A.double() - expected.factors["layer"].A).norm() / expected.factors["layer"].A.norm()
    assert error < 0.01


def test_a_layer_without_a_batch_dimension() -> None:
    class Whole(nn.Module):
        """The batch is one example for the convolution: its channels are the examples."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model, x = Whole().double(), draw(3, 5)
    k = ng.kronecker_fisher(model, ng.Gaussian(), x, expectation="exact")
    ones = torch.cat([x[:, None], torch.ones(3, 1, 5, dtype=x.dtype)], 1)
    torch.testing.assert_close(k.factors["conv"].A, ones @ ones.mT / 3)


def test_nan_batches_do_not_poison_convolution_factors() -> None:
    net, x = conv_net()
    y, pre = torch.tensor([0, 1, 2]), ng.Preconditioner(net, ng.Categorical(), periods=ng.Renewal(1, (), 1))
    for batch in (x, x * torch.nan, x):
        net.zero_grad()
        z = net(batch)
        pre.observe(z)
        ng.Categorical().nll(net(x), y).backward()
        pre.step()
    assert pre.stats["skipped"] == 1
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


class Sequential3d(nn.Module):
    """A linear layer at several positions, whose output is a view, and an activation in place on it."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.inplace = nn.Linear(3, 4), nn.Linear(4, 2), inplace
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        s = self.a(x)
        s = s.mul_(2).relu_() if self.inplace else s.mul(2).relu()
        return self.b(s)


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("likelihood", [ng.Categorical("element"), ng.Gaussian()], ids=lambda lik: type(lik).__name__)
def test_activations_in_place_on_a_view(expectation: str, likelihood: Any) -> None:
    """The output of a linear layer with positions is a view: to change it in place rewrites its history."""
    x = draw(4, 5, 3)
    models = Sequential3d(True), Sequential3d(False)
    y = torch.arange(20).view(4, 5) % 2 if isinstance(likelihood, ng.Categorical) else draw(4, 5, 2, seed=1)
    found, expected = (ng.kronecker_fisher(m, likelihood, x, expectation=expectation, y=y).factors for m in models)
    for name in ("a", "b"):
        torch.testing.assert_close(found[name].to_dense(), expected[name].to_dense())
    assert found["a"].G.trace() > 1e-3
    gradients = []
    for model in models:
        pre = ng.Preconditioner(model, likelihood, expectation=expectation)
        z = model(x)
        pre.observe(z, y)
        likelihood.nll(z, y).backward()
        pre.step()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    losses = [[ng.KFAC(m, likelihood, seed=1).step(x, y).item() for _ in range(3)][-1] for m in models]
    assert losses[0] == pytest.approx(losses[1])


def test_activations_in_place_on_a_convolution_without_a_batch() -> None:
    x, found = draw(2, 5, 5), []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace), nn.Flatten(0), nn.Unflatten(0, (1, 27))).double()
        found.append(ng.kronecker_fisher(model, ng.Gaussian(), x).to_dense())
    torch.testing.assert_close(*found)
    assert found[0].trace() > 1


class Steps(nn.Module):
    """A recurrent layer inside activation checkpointing, or not."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = issubclass(kind, nn.RNNCellBase)
        self.r, self.head, self.checkpointed = kind(3, 4), nn.Linear(4, 3), False
        self.double()

    def states(self, x: Tensor) -> Tensor:
        if not self.cell:
            return self.r(x.transpose(0, 1))[0][-1]
        state: Any = None
        for step in x.unbind(1):
            state = self.r(step, state)
        return state[0] if isinstance(state, tuple) else state

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.states, x, use_reentrant=False) if self.checkpointed else self.states(x))


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell, nn.GRU, nn.LSTM, nn.RNN])
def test_a_checkpointed_recurrent_layer_is_computed_again_as_it_was(kind: Any, expectation: str) -> None:
    """Otherwise what the kernel saves stands in for what the loop saved: wrong gradients, of the same shapes."""
    model, x, y = Steps(kind), draw(5, 4, 3), torch.arange(5) % 3
    found = []
    for model.checkpointed in (False, True):
        pre = ng.Preconditioner(model, ng.Categorical(), expectation=expectation, periods=ng.Renewal(3, (1,), 3))
        for due in (True, False):  # the second pass is not recorded
            model.zero_grad()
            z = model(x)
            pre.observe(z, y)
            ng.Categorical().nll(z, y).backward()
            found.append([p.grad.clone() for p in model.parameters()])
            assert pre.due == due
            pre.step()
        found.append([factors.to_dense() for factors in pre._running.factors.values()])
        assert not torch.overrides._get_current_function_mode_stack()
    for plain, checkpointed in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(checkpointed, plain)
