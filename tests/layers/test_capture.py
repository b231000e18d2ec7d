"""What the hooks record, in every situation that is known to fool hooks."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from natgrad.layers.capture import Capture

torch_double = {"dtype": torch.float64}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def mlp(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2)).double()


def expected(model: nn.Sequential, x: torch.Tensor, c: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(a, g) of the two layers, written out."""
    first, last = model[0], model[2]
    s = x @ first.weight.T + first.bias
    return {"0": (x, (c @ last.weight) * (s > 0)), "2": (s.clamp(min=0), c)}


def check(record, z, model, x):
    c = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), **torch_double)
    gradients = record.output_gradients(z, c)
    inputs = record.inputs
    for name, (a, g) in expected(model, x, c).items():
        assert len(inputs[name]) == len(gradients[name]) == 1
        assert not inputs[name][0].requires_grad
        torch.testing.assert_close(inputs[name][0], a.detach())
        torch.testing.assert_close(gradients[name][0], g.detach())


@pytest.fixture
def x():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1), **torch_double)


def test_inputs_and_output_gradients(x):
    model = mlp()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    check(record, z, model, x)
    assert all(p.grad is None for p in model.parameters())
    assert record.source(z) == "2"
    assert record.source(z * 1) is None and record.source(z.detach()) is None


def test_graph_is_kept_for_the_loss(x):
    model = mlp()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    record.output_gradients(z, torch.ones_like(z))
    z.square().sum().backward()
    twin = mlp()
    twin(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_gradients_of_parameters_in_the_same_pass(x):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    unused = nn.Parameter(torch.zeros(2, **torch_double))
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    c = torch.ones_like(z)
    gradients, (scale, nothing) = record.gradients(z, c, parameters=[model[1].weight, unused])
    assert nothing is None
    torch.testing.assert_close(scale, torch.autograd.grad(z, model[1].weight, c, retain_graph=True)[0])
    torch.testing.assert_close(gradients["3"][0], c)


def test_batched_cotangents(x):
    model = mlp()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    C = torch.randn(4, *z.shape, **torch_double)
    together = record.output_gradients(z, C, batched=True)
    for i, c in enumerate(C):
        for name, found in record.output_gradients(z, c).items():
            torch.testing.assert_close(together[name][0][i], found[0])


def test_inplace_activation_after_the_layer(x):
    model = mlp(inplace=True)
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    check(record, z, model, x)


def test_silent_outside_record(x):
    model = mlp()
    capture = Capture(model, linears(model))
    model(x)
    with capture.record() as record:
        pass
    model(x)
    assert record.inputs == {}


def test_input_changed_in_place_later(x):
    model = mlp()
    capture = Capture(model, linears(model))
    y = x.clone()
    with capture.record() as record:
        model(y)
    y += 1
    with pytest.raises(RuntimeError, match="layer '0' was changed in place"):
        record.inputs  # noqa: B018


def test_inference_tensors_as_input():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    capture = Capture(model, {"": model})
    with torch.inference_mode():
        x = torch.randn(4, 3)
        with capture.record() as record:
            model(x)
    assert torch.equal(record.inputs[""][0], x)


def test_layer_called_twice_and_by_keyword(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(input=torch.tanh(self.fc(x)))

    model = Twice().double()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    h = torch.tanh(model.fc(x)).detach()
    c = torch.ones_like(z)
    first, second = record.output_gradients(z, c)["fc"]
    torch.testing.assert_close(record.inputs["fc"][0], x)
    torch.testing.assert_close(record.inputs["fc"][1], h)
    torch.testing.assert_close(second, c)
    torch.testing.assert_close(first, (c @ model.fc.weight * (1 - h**2)).detach())
    assert record.source(z) is None


def test_outputs_that_z_does_not_depend_on(x):
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.side, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            self.side(x)
            with torch.no_grad():
                self.used(x)
            return self.used(self.frozen(x))

    model = Side().double()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
    g = record.output_gradients(z, torch.ones_like(z))
    assert [t.abs().sum().item() for t in g["used"]] == [0, z.numel()]
    assert g["side"][0].abs().sum() == 0 == g["frozen"][0].abs().sum()
    assert g["frozen"][0].shape == (5, 3)


@pytest.mark.parametrize("inside", ["model", "block"])
def test_exceptions_leave_nothing(x, inside):
    model = mlp()
    capture = Capture(model, linears(model))
    with pytest.raises(ZeroDivisionError if inside == "block" else RuntimeError):
        with capture.record() as record:
            model(x)
            model(x[:, :2]) if inside == "model" else 1 / 0
    assert record.inputs == {}
    model(x)
    assert record.inputs == {}
    with capture.record() as record:
        z = model(x)
    check(record, z, model, x)


def test_nested_recording_is_refused(x):
    model = mlp()
    capture = Capture(model, linears(model))
    with pytest.raises(RuntimeError, match="recording already"):
        with capture.record(), capture.record():
            pass
    with capture.record():
        pass


def test_two_captures_on_one_model(x):
    model = mlp()
    one, two = Capture(model, linears(model)), Capture(model, linears(model))
    with one.record() as record:
        z = model(x)
    check(record, z, model, x)
    with two.record() as record:
        pass
    assert record.inputs == {}


def test_copies_do_not_feed_the_original(x):
    model = mlp()
    capture = Capture(model, linears(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model[0]),
        torch.load(buffer, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model),
    ]
    with capture.record() as record:
        for other in copies:
            other(x)
    assert record.inputs == {}
    with capture.record() as record:
        z = model(x)
    check(record, z, model, x)


def test_copied_in_the_middle_of_a_recording(x):
    model = mlp()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        copy.deepcopy(model)(x)
        z = model(x)
    check(record, z, model, x)


def test_a_capture_is_not_copied():
    model = mlp()
    with pytest.raises(TypeError, match="make a new one"):
        copy.deepcopy(Capture(model, linears(model)))


def test_hooks_go_with_the_capture(x):
    model = mlp()
    capture = Capture(model, linears(model))
    assert len(model[0]._forward_hooks) == 1
    reference = weakref.ref(capture)
    del capture
    gc.collect()
    assert reference() is None and len(model[0]._forward_hooks) == 0
    capture = Capture(model, linears(model))
    capture.remove()
    capture.remove()
    assert len(model[0]._forward_hooks) == len(model[0]._forward_hooks_with_kwargs) == 0


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_compiled_models(x, hooked, how):
    model = mlp()
    capture = Capture(model, linears(model)) if hooked == "before" else None
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    plain = compiled(x)
    capture = capture or Capture(model, linears(model))
    with capture.record() as record:
        z = compiled(x)  # compiled code: the hooks are silent
    assert torch.equal(z, plain)
    with torch.compiler.set_stance("force_eager"), capture.record() as record:
        z = compiled(x)
    check(record, z, model, x)
    with capture.record() as record:
        pass
    torch._dynamo.reset()


class Checkpointed(nn.Sequential):
    def __init__(self, model, reentrant):
        super().__init__(*model)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def test_checkpointed_forward_is_recorded_once(x):
    model = Checkpointed(mlp(), reentrant=False)
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x)
        check(record, z, model, x)  # its backward pass recomputes the forward pass inside the recording
        check(record, z, model, x)


def test_reentrant_checkpointing_is_refused_by_name(x):
    model = Checkpointed(mlp(), reentrant=True)
    capture = Capture(model, linears(model))
    with capture.record() as record:
        z = model(x.clone())
    with pytest.raises(RuntimeError, match="0, 2.*use_reentrant=False"):
        record.output_gradients(z, torch.ones_like(z))


def test_functional_calls_are_not_layers(x):
    model = mlp()
    capture = Capture(model, linears(model))
    with capture.record() as record:
        F.linear(x, model[0].weight)
    assert record.inputs == {}
