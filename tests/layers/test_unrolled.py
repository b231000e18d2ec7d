"""``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``: unrolled in recorded passes, with the factors of the same cells in a loop."""

import copy
import itertools
from typing import Any

import pytest
import torch
from curvature.test_ekfac_convolutions import check
from oracles.layers import draw
from oracles.recurrent import learns_a_sum
from torch import Tensor, nn

import natgrad as ng
from natgrad.layers.unrolled import UnrolledInterceptor

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rnn": (nn.RNN, nn.RNNCell, {}),
    "relu": (nn.RNN, nn.RNNCell, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, nn.LSTMCell, {}),
    "gru": (nn.GRU, nn.GRUCell, {}),
    "projected": (nn.LSTM, None, {"proj_size": 2}),
}


def parts(found: Any) -> list[Tensor]:
    output, state = found
    return [getattr(output, "data", output), *(state if isinstance(state, tuple) else [state])]


def inputs(batch_first: bool) -> dict[str, Any]:
    lengths = (3, 6, 1, 3, 4)
    packed = nn.utils.rnn.pack_sequence([draw(n, 3, seed=n) for n in lengths], enforce_sorted=False)
    return {"batch": draw(5, 6, 3) if batch_first else draw(6, 5, 3), "packed": packed, "one": draw(6, 3)}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_is_the_kernel(kind: str, dropout: float) -> None:
    """Outputs, last states, layout, gradients and the random stream, for every option."""
    make, _, options = KINDS[kind]
    switches = [(2, True, True, True), (2, False, False, False), (1, True, False, False), (1, False, True, True)]
    for layers, both, batch_first, bias in switches[: 2 if dropout else 4]:
        torch.manual_seed(0)
        how = {"bias": bias, "batch_first": batch_first, "dropout": dropout, "bidirectional": both}
        model = make(3, 4, layers, **how, **options).double()
        width = options.get("proj_size", 4)
        states = draw(layers * (1 + both), 5, width), draw(layers * (1 + both), 5, 4, seed=1)
        for (name, x), given in itertools.product(inputs(batch_first).items(), (False, True)):
            state: Any = [s[:, 0] if name == "one" else s for s in states] if given else None
            state = (tuple(state) if make is nn.LSTM else state[0]) if given else None
            torch.manual_seed(3)
            expected, stream = parts(model(x, state)), torch.get_rng_state()
            torch.manual_seed(3)
            with UnrolledInterceptor(model, lambda *_: None):
                found = parts(model(x, state))
            assert torch.equal(torch.get_rng_state(), stream)
            gradients = []
            for tensors in (expected, found):
                gradients.append(torch.autograd.grad(sum((t * t).sum() for t in tensors), list(model.parameters())))
            for a, b in zip((*found, *gradients[1]), (*expected, *gradients[0]), strict=True):
                torch.testing.assert_close(a, b)
            assert [t.stride() for t in found] == [t.stride() for t in expected]


class Fused(nn.Module):
    """A recurrent module, and a linear layer on its outputs at every step (or on its last state)."""

    def __init__(self, kind: str, both: bool = False, layers: int = 1, last: bool = False, head: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, _, options = KINDS[kind]
        self.rnn = make(3, 4, layers, batch_first=True, bidirectional=both, **options)
        self.head, self.last = nn.Linear(options.get("proj_size", 4) * (1 + both), head), last
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output = self.rnn(x)[0]
        return self.head(output[:, -1] if self.last else output)


class Loop(nn.Module):
    """The same from cells, one for every layer and direction."""

    def __init__(self, model: Fused, kind: str) -> None:
        super().__init__()
        self.cells, self.head, self.last = nn.ModuleDict(), model.head, model.last
        for name in model.rnn._flat_weights_names:
            if name.startswith("weight_ih_"):
                key = name.removeprefix("weight_ih_")
                options = {k: v for k, v in KINDS[kind][2].items()}
                cell = KINDS[kind][1](model.rnn.get_parameter(name).shape[1], 4, **options).double()
                for own in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    getattr(cell, own).data = model.rnn.get_parameter(f"{own}_{key}").data.clone()
                self.cells[key] = cell

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unbind(1)
        for layer in range(sum("reverse" not in key for key in self.cells)):
            ways = []
            for key in (f"l{layer}", f"l{layer}_reverse"):
                if key in self.cells:
                    state, outputs = None, []
                    for step in steps[::-1] if "reverse" in key else steps:
                        state = self.cells[key](step, state)
                        outputs.append(state[0] if isinstance(state, tuple) else state)
                    ways.append(outputs[::-1] if "reverse" in key else outputs)
            steps = [torch.cat(found, dim=1) for found in zip(*ways, strict=True)]
        return self.head(steps[-1] if self.last else torch.stack(steps, dim=1))


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize(("both", "layers"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][1] is not None])
def test_factors_are_those_of_cells(kind: str, both: bool, layers: int, expectation: str) -> None:
    model, x = Fused(kind, both, layers), draw(4, 5, 3)
    twin, y = Loop(model, kind), torch.arange(20).view(4, 5) % 3
    torch.testing.assert_close(model(x), twin(x))
    given = {"expectation": expectation, "y": y}
    found = ng.kronecker_fisher(model, ng.Categorical(), x, **given)
    expected = ng.kronecker_fisher(twin, ng.Categorical(), x, **given)
    names = {f"rnn.{which}_{key}": f"cells.{key}.{which}" for key in twin.cells for which in ("ih", "hh")}
    assert set(found.factors) == {*names, "head"}
    for own, cell in names.items():
        torch.testing.assert_close(found.factors[own].A, expected.factors[cell].A)
        torch.testing.assert_close(found.factors[own].G, expected.factors[cell].G)
    torch.testing.assert_close(found.factors["head"].to_dense(), expected.factors["head"].to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_one_example_is_exact_and_ekfac_has_the_diagonal(kind: str) -> None:
    model, x = Fused(kind, both=True), draw(3, 4, 3)
    one = x[:1, :1]
    F = ng.Fisher(model, ng.Categorical(), one).to_dense()
    for index, block in ng.kronecker_fisher(model, ng.Categorical(), one).blocks:
        torch.testing.assert_close(block.to_dense(), F[index[:, None], index])
    check(Fused(kind, last=True), ng.Categorical(), x)


class Packed(nn.Module):
    """Sequences of several lengths, padded with zeros, packed for the recurrent module; z from its last states."""

    lengths = (2, 5, 1, 4)

    def __init__(self, kind: str, packed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.packed = KINDS[kind][0](3, 4, batch_first=True).double(), nn.Linear(4, 3), packed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = torch.tensor(self.lengths[: len(x)])
            state = self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])
        found = [self.rnn(one[None, :n])[0][:, -1] for one, n in zip(x, self.lengths, strict=False)]
        return self.head(torch.cat(found))


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_packed_sequences_are_those_sequences(kind: str) -> None:
    x = draw(4, 5, 3)
    model, twin = Packed(kind, True), Packed(kind, False)
    torch.testing.assert_close(model(x), twin(x))
    for expectation in ("exact", "empirical"):
        given = {"expectation": expectation, "y": torch.arange(4) % 3}
        found = ng.kronecker_fisher(model, ng.Categorical(), x, **given)
        expected = ng.kronecker_fisher(twin, ng.Categorical(), x, **given)
        for name, factors in found.factors.items():
            torch.testing.assert_close(factors.to_dense(), expected.factors[name].to_dense())
    with pytest.raises(ValueError, match=r"rnn.ih_l0.*gradient of an example.*block_diagonal"):
        ng.kronecker_fisher(model, ng.Categorical(), x, structure="ekfac")


def test_some_rows_of_packed_sequences_are_an_unbiased_estimate() -> None:
    """Whose rows are whose is not known: all of them count, as much as the examples that are asked for."""
    model, x, y = Packed("gru", True), draw(4, 5, 3), torch.arange(4) % 3
    found = []
    for order in itertools.permutations(range(4), 2):  # the first two examples of every order of the batch
        index = torch.tensor([*order, *(set(range(4)) - set(order))])
        model.lengths = tuple(Packed.lengths[i] for i in index)
        pre = ng.Preconditioner(
            model, ng.Categorical(), periods=ng.Renewal(rows=0.5), expectation="exact", uncovered="identity"
        )
        pre.update(x[index], y[index])
        statistics = pre._pending.take(torch.device("cpu"), 1)
        assert statistics is not None
        found.append(ng.curvature.base.factors_from(statistics))
    model.lengths = Packed.lengths
    k = ng.kronecker_fisher(model, ng.Categorical(), x)
    for name in ("rnn.ih_l0", "rnn.hh_l0"):
        mean_A = torch.stack([factors[name].A for factors in found]).mean(0)
        mean_G = torch.stack([factors[name].G for factors in found]).mean(0)
        torch.testing.assert_close(mean_A, k.factors[name].A)
        torch.testing.assert_close(mean_G, k.factors[name].G)


@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: str) -> None:
    learns_a_sum(lambda: Fused(kind, last=True, head=2), below=0.35)


def test_copies_frozen_parts_and_passes_without_a_record() -> None:
    """The kernel runs wherever nothing is recorded; a copy of a hooked model is a plain one."""
    model, x = Fused("lstm"), draw(4, 5, 3)
    model.rnn.bias_hh_l0.requires_grad_(False)
    z = model(x)
    pre = ng.Preconditioner(model, ng.Categorical())
    assert pre.coverage().blocks["rnn.hh_l0"].factor_shapes == ((4, 4), (16, 16))
    copied, calls = copy.deepcopy(model), []
    with UnrolledInterceptor(copied.rnn, lambda *seen: calls.append(seen[0])):
        pass
    assert torch.equal(copied(x), z) and not calls and not pre._watch._passes
    pre.observe(model(x))
    with torch.no_grad():
        assert torch.equal(model(x), z)
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises(RuntimeError):
        model(draw(4, 5, 7))
    assert not torch.overrides._get_current_function_mode_stack() and torch.equal(model(x).detach(), z.detach())


@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 4), lambda: nn.GRUCell(3, 4), lambda: nn.MultiheadAttention(3, 1)])
def test_two_preconditioners_see_the_same(make: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = make()
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.layer, nn.GRUCell):
                return self.layer(x[0], self.layer(x[1]))
            return (self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x))[0][-1]

    model, x = Model(), draw(2, 5, 3)
    pres = [ng.Preconditioner(model, ng.Gaussian(), expectation="exact") for _ in range(2)]
    z = model(x)
    for pre in pres:
        pre.observe(z)
    found = [pre._pending.take(torch.device("cpu"), 1) for pre in pres]
    for name, sums in found[0].layers.items():
        assert torch.equal(sums.A, found[1].layers[name].A) and torch.equal(sums.G, found[1].layers[name].G)
        assert sums.A.abs().sum() > 0 and sums.G.abs().sum() > 0
    assert not torch.overrides._get_current_function_mode_stack()
    expected = ng.kronecker_fisher(model, ng.Gaussian(), x.transpose(0, 1), forward=lambda m, t: m(t.transpose(0, 1)))
    for name, factors in ng.curvature.base.factors_from(found[0]).items():
        torch.testing.assert_close(factors.to_dense(), expected.factors[name].to_dense())
