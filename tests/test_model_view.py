"""The model view: call convention, names and order, vectors, substitution of parameters, replay, curvature passes."""

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import networks
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from natgrad.model_view import ModelView, batch_size, clean_name, select_rows, unwrap


class DataParallelLike(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args)


DataParallelLike.__name__ = "DistributedDataParallel"  # the real one wants a process group


def _dropout_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()


# -- inputs


def test_batch_size_and_rows_of_nested_inputs() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    inputs = {"a": x, "b": (torch.tensor(7.0), [x + 1]), "table": torch.ones(2, 2), "flag": True}
    assert batch_size(inputs) == 4
    some = select_rows(inputs, torch.tensor([3, 0]))
    assert torch.equal(some["a"], x[[3, 0]]) and torch.equal(some["b"][1][0], x[[3, 0]] + 1)
    assert some["b"][0] == 7 and some["table"].shape == (2, 2) and some["flag"] is True
    assert torch.equal(select_rows(x, slice(1, 3)), x[1:3])


def test_a_mapping_that_is_no_dict() -> None:
    view = ModelView(networks.TwoInputs())
    inputs = UserDict(a=torch.randn(5, 2), b=torch.randn(5, 4))
    assert batch_size(inputs) == 5
    torch.testing.assert_close(view(select_rows(inputs, slice(0, 2))), view(inputs)[:2])


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="inputs: the batch is empty"):
        batch_size(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="inputs: expected a tensor"):
        batch_size({"a": 3})


@pytest.mark.parametrize("name", ["mlp", "tuple", "mapping", "forward"])
def test_call_convention(name: str) -> None:
    case = networks.case(name)
    view = ModelView(case.model, case.forward)
    assert torch.equal(view(case.x), case.z)
    assert torch.equal(view.functional(view.parameters, case.x), case.z)


def test_output_that_is_no_tensor_names_forward() -> None:
    view = ModelView(networks.Pair())
    for call in (view, lambda x: view.functional(view.parameters, x)):
        with pytest.raises(TypeError, match="tuple.*forward="):
            call(torch.randn(2, 3))


def test_inputs_of_another_dtype_device_or_width_are_named() -> None:
    view = ModelView(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="inputs: .*float64.*float32"):
        view(torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="inputs: .*meta.*cpu"):
        view(torch.randn(2, 3, device="meta"))
    with pytest.raises(ValueError, match="inputs: .*int64.*float32"):
        view(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs: .*shape \(2, 4\).*layer '' takes 3 features"):
        view(torch.randn(2, 4))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model: .*function"):
        ModelView(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forward: .*str"):
        ModelView(nn.Linear(1, 1), "forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameters"):
        ModelView(nn.Linear(1, 1).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameters"):
        ModelView(nn.Tanh())
    with pytest.raises(ValueError, match="weight is not initialised"):
        ModelView(nn.LazyLinear(2))


# -- names, order and vectors


def test_clean_name() -> None:
    assert clean_name("_orig_mod.0.weight") == "0.weight"
    assert clean_name("module._orig_mod.layers.1._orig_mod.bias") == "layers.1.bias"
    assert clean_name("_fsdp_wrapped_module.a._checkpoint_wrapped_module.weight") == "a.weight"
    assert clean_name("encoder.module.weight") == "encoder.module.weight"
    assert clean_name("") == ""


@pytest.mark.parametrize("name", networks.NAMES)
def test_order_is_that_of_parameters(name: str) -> None:
    model = networks.case(name).model
    view = ModelView(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert view.num_parameters == sum(p.numel() for p in trainable)
    assert view.names == tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(a is b for a, b in zip(view.parameters.values(), trainable, strict=True))
    assert torch.equal(view.to_vector(view.parameters), parameters_to_vector(trainable))


@given(columns=st.none() | st.integers(0, 3), name=st.sampled_from(["mlp", "tied", "frozen", "scalar"]))
def test_vectors_and_dicts_are_inverse(columns: int | None, name: str) -> None:
    view = ModelView(networks.case(name).model)
    shape = (view.num_parameters,) if columns is None else (view.num_parameters, columns)
    v = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    d = view.to_dict(v)
    assert tuple(d) == view.names
    assert all(d[n].shape == (*p.shape, *shape[1:]) for n, p in view.parameters.items())
    assert torch.equal(view.to_vector(d), v)
    assert torch.equal(view.to_vector(dict(reversed(d.items()))), v)


def test_bad_dicts_and_vectors() -> None:
    view = ModelView(nn.Linear(3, 2))
    good = view.to_dict(torch.zeros(8))
    with pytest.raises(ValueError, match="lacks 'bias'"):
        view.to_vector({"weight": good["weight"]})
    with pytest.raises(ValueError, match="unknown 'other'"):
        view.to_vector({**good, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"bias: expected .*\(2,\), got \(3,\)"):
        view.to_vector({**good, "bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"\[8\]"):
        view.to_dict(torch.zeros(9))


def test_wrappers_do_not_show_in_names() -> None:
    model = networks.case("mlp").model
    names = ModelView(model).names
    for wrapped in (
        torch.compile(model),
        DataParallelLike(model),
        torch.compile(DataParallelLike(model)),
        torch.optim.swa_utils.AveragedModel(model),
        nn.DataParallel(model),
    ):
        view = ModelView(wrapped)
        assert view.names == names and view.model is wrapped
        raw = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        assert torch.equal(view.to_vector(raw), parameters_to_vector(raw.values()))
    inner = nn.Sequential(torch.compile(nn.Linear(3, 2)), nn.Tanh())
    assert ModelView(inner).names == ("0.weight", "0.bias")
    x = torch.randn(2, 3)
    with ModelView(inner).curvature_pass():
        torch.testing.assert_close(ModelView(inner).functional(ModelView(inner).parameters, x), inner(x))


def test_a_module_called_module_is_no_wrapper() -> None:
    class Holder(DataParallelLike):
        pass

    model = nn.Sequential(Holder(nn.Linear(2, 1)))
    holder = Holder.__new__(Holder)
    assert type(holder).__name__ == "Holder"
    assert ModelView(model).names == ("0.module.weight", "0.module.bias")
    assert unwrap(model) is model


# -- substitution of parameters


def test_tied_weights_receive_one_tensor() -> None:
    case = networks.case("tied")
    view = ModelView(case.model)
    assert view.names == ("first.weight", "first.bias", "second.bias")
    values = {n: p.detach() * 2 for n, p in view.parameters.items()}
    doubled = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.testing.assert_close(view.functional(values, case.x), doubled(case.x))


@pytest.mark.parametrize("name", ["layer_twice", "tied", "tied_bias", "batch_norm_eval"])
def test_every_parameter_and_buffer_is_put_back(name: str) -> None:
    """A module that occurs under two names as well: its own tensors, not those that were put in for a while."""
    case = networks.case(name)
    view = ModelView(case.model)
    before = [dict(m._parameters) | dict(m._buffers) for m in case.model.modules()]
    values = {n: (2 * p.detach()).requires_grad_() for n, p in view.parameters.items()}
    doubled = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.testing.assert_close(view.functional(values, case.x), doubled(case.x))
    after = [dict(m._parameters) | dict(m._buffers) for m in case.model.modules()]
    assert all(new[key] is tensor for old, new in zip(before, after, strict=True) for key, tensor in old.items())


def test_a_parameter_that_the_model_has_no_more_is_named() -> None:
    case = networks.case("mlp")
    view = ModelView(case.model)
    nn.utils.parametrizations.weight_norm(case.model[0])
    with pytest.raises(ValueError, match="model: 0.weight is not one of its parameters any more"):
        view.functional({n: p.detach() for n, p in view.parameters.items()}, case.x)


def test_a_forward_that_remembers_the_model_still_sees_the_parameters() -> None:
    case = networks.case("mlp")
    view = ModelView(case.model, forward=lambda _, x: case.model(x))
    point = {n: p.detach() for n, p in view.parameters.items()}
    ones = {n: torch.ones_like(p) for n, p in point.items()}
    _, tangent = torch.func.jvp(lambda p: view.functional(p, case.x), (point,), (ones,))
    assert tangent.norm() > 0.1


def test_functional_leaves_running_statistics() -> None:
    model = _dropout_model()
    view, x = ModelView(model), torch.randn(5, 3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    point = {n: p.detach() for n, p in view.parameters.items()}
    torch.func.jvp(lambda p: view.functional(p, x), (point,), (point,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- replay


def test_replay_brings_back_masks_and_buffers_and_leaves_no_trace() -> None:
    model = _dropout_model()
    view, x = ModelView(model), torch.randn(5, 3, dtype=torch.float64)
    replay = view.snapshot()
    rng = torch.get_rng_state()
    first = view(x)
    moved, after = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not torch.equal(rng, after) and moved["1.num_batches_tracked"] == 1
    buffers = [id(b) for b in model.buffers()]
    for _ in range(2):
        with replay:
            assert model[1].num_batches_tracked == 0
            assert torch.equal(view(x), first)
        with replay, replay:
            assert torch.equal(view.functional(view.parameters, x), first)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(value, moved[name]) for name, value in model.state_dict().items())
    assert buffers == [id(b) for b in model.buffers()]
    assert not torch.equal(view(x), first)


def test_replay_restores_after_an_exception() -> None:
    model = _dropout_model()
    view = ModelView(model)
    replay = view.snapshot()
    torch.randn(3)
    state, mean = torch.get_rng_state(), model[1].running_mean
    with pytest.raises(ZeroDivisionError), replay:
        view(torch.randn(5, 3, dtype=torch.float64))
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state) and model[1].running_mean is mean


def test_replay_does_not_invalidate_graphs_from_outside() -> None:
    model = _dropout_model().eval()  # BatchNorm in eval mode saves its running statistics for the backward pass
    view, x = ModelView(model), torch.randn(5, 3, dtype=torch.float64)
    loss = view(x).sum()
    model.train()
    with view.snapshot():
        view(x)
    loss.backward()


# -- curvature passes


def test_curvature_pass_restores_every_switch() -> None:
    view = ModelView(nn.LSTM(2, 2), forward=lambda m, x: m(x)[0])

    def switches() -> tuple:
        return (
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.is_grad_enabled(),
        )

    before = switches()
    with pytest.raises(ZeroDivisionError), view.curvature_pass():
        assert switches()[:4] == (False, False, False, False)
        raise ZeroDivisionError
    assert switches() == before
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with view.curvature_pass():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with view.curvature_pass(once=True):  # attention may be fused: its first derivative exists
        assert switches()[:5] == (False, False, False, *before[3:5])
    assert switches() == before
