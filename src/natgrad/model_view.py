"""The one place that evaluates a model.

Call convention, parameter order, dict ↔ vector, tied weights, wrappers, and the replay of buffers and random numbers.
Every optimiser and every curvature sees a model through a `ModelView`, so that all mean the same function and the
same order.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from natgrad.places import places_of
from natgrad.replay import Replay

Forward = Callable[[nn.Module, Any], Tensor]

# Segments that wrappers put into names and that no one gives to a module of their own.
_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# Wrappers that keep the model they wrap as `.module`.
_WRAPPER_CLASSES = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel"})


def clean_name(name: str) -> str:
    """The name of a module or parameter without the prefixes of wrappers.

    ``torch.compile`` adds ``_orig_mod.``, activation checkpointing and FSDP add segments of their own, at any depth;
    ``DistributedDataParallel`` adds a leading ``module.``.
    """
    segments = [segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS]
    while segments and segments[0] == "module":
        segments.pop(0)
    return ".".join(segments)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside compiled and data-parallel wrappers (a model that is not wrapped is returned as it is)."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) and any(c.__name__ in _WRAPPER_CLASSES for c in type(model).__mro__):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def tensor_leaves(inputs: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists and mappings, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(_plain(inputs)) if isinstance(leaf, Tensor)]


def batch_size(inputs: Any, name: str = "inputs") -> int:
    """Dimension 0 of the first tensor in ``inputs`` that has one.

    Raises:
        ValueError: there is no such tensor, or the batch is empty.
    """
    for leaf in tensor_leaves(inputs):
        if leaf.ndim:
            if leaf.shape[0] == 0:
                raise ValueError(
                    f"{name}: the batch is empty (a tensor of shape {tuple(leaf.shape)}); expected at least one "
                    "example in dimension 0"
                )
            return leaf.shape[0]
    raise ValueError(
        f"{name}: expected a tensor, or a tuple, list or mapping that holds tensors with the examples in dimension 0; "
        f"got {type(inputs).__name__} without one"
    )


def select_rows(inputs: Any, index: Tensor | slice) -> Any:
    """The same nest with some examples only: ``index`` picks rows of every tensor with the batch in dimension 0."""
    size = batch_size(inputs)

    def rows(leaf: Any) -> Any:
        return leaf[index] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size else leaf

    return pytree.tree_map(rows, _plain(inputs))


def _plain(inputs: Any) -> Any:
    """Mappings that ``pytree`` does not know (tokenizers return such) as dicts."""
    return dict(inputs) if isinstance(inputs, Mapping) and type(inputs) is not dict else inputs


def call_model(model: nn.Module, inputs: Any) -> Tensor:
    """The default call convention: a tensor → ``model(x)``, a tuple → ``model(*x)``, a mapping → ``model(**x)``."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


class _Bound(nn.Module):
    """``forward(model, inputs)`` as a module, so that ``functional_call`` can put other parameters into the model."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self.call = forward

    def forward(self, inputs: Any) -> Any:
        return self.call(self.model, inputs)


class ModelView:
    """A model as a function of its trainable parameters.

    Args:
        model: any module. Compiled and data-parallel wrappers are unwrapped for names and for curvature passes.
        forward: ``forward(model, inputs) → z`` where the default call convention does not fit. It must use the model
            that it is given, not a copy it remembers: curvature passes put other parameters into that one.

    Attributes:
        model: the model as given.
        module: the model without its wrappers; names refer to it.
        forward: as given.
        names: the trainable parameters in the order of ``named_parameters()``, a tied one once, by its first name.
        parameters: name → parameter.
        num_parameters: P, the length of a vector over the parameters.

    Raises:
        TypeError: ``model`` is no module or ``forward`` no callable.
        ValueError: no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward: expected a callable forward(model, inputs), got {type(forward).__name__}")
        self.model = model
        self.module = unwrap(model)
        self.forward = forward
        raw = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not raw:
            raise ValueError(
                f"model: {type(self.module).__name__} has no trainable parameters; expected at least one with "
                "requires_grad=True (are all layers frozen?)"
            )
        uninitialised = [name for name, p in raw.items() if nn.parameter.is_lazy(p)]
        if uninitialised:
            raise ValueError(f"model: {uninitialised[0]} is not initialised yet; run one batch through the model first")
        numbers = [name for name, p in raw.items() if p.is_complex()]
        if numbers:
            raise ValueError(
                f"model: {numbers[0]} is complex; expected real parameters (torch.view_as_real makes them)"
            )
        self._raw_names = {_strip_wrappers(name): name for name in raw}
        self._parameters = {clean: raw[name] for clean, name in self._raw_names.items()}
        self.names: tuple[str, ...] = tuple(self._parameters)
        self.num_parameters = sum(p.numel() for p in raw.values())
        self._bound = _Bound(self.module, forward or call_model)
        self._has_rnn = any(isinstance(m, nn.RNNBase) for m in self.module.modules())

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter, in order."""
        return dict(self._parameters)

    @property
    def device(self) -> torch.device:
        """The device of the first trainable parameter."""
        return self._parameters[self.names[0]].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a vector over the parameters: the widest among them."""
        dtype = self._parameters[self.names[0]].dtype
        for parameter in self._parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    def __call__(self, inputs: Any) -> Tensor:
        """The output z of ``model(inputs)``: the module itself with its wrappers, hooks and buffers.

        Raises:
            TypeError: the output is no tensor.
            ValueError: an input has another dtype or device than the model, and the model fails on it.
        """
        with self._explained(inputs):
            z = (self.forward or call_model)(self.model, inputs)
        return self._checked(z)

    def functional(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """The output z as a function of the parameters: differentiable in both modes and under ``vmap``.

        Parameters that ``parameters`` does not name keep their value. Tied weights receive one tensor. Buffers are
        cloned: running statistics of the model do not move (and ``jvp`` accepts BatchNorm in train mode).

        Args:
            parameters: name → tensor shaped like the parameter.
            inputs: one batch.

        Raises:
            TypeError: the output is no tensor.
            ValueError: an input has another dtype or device than the model, and the model fails on it.
        """
        places, buffers = places_of(self.module, "model.")
        state = {place: copy for copy, together in buffers for place in together}
        for name, value in parameters.items():
            together = places.get(f"model.{self._raw_names[name]}")
            if together is None:
                raise ValueError(
                    f"model: {name} is not one of its parameters any more; make a new one of what holds it"
                )
            state.update((place, value) for place in together)
        with self._explained(inputs):
            z = torch.func.functional_call(self._bound, state, (inputs,), tie_weights=False)
        return self._checked(z)

    def to_vector(self, d: Mapping[str, Tensor]) -> Float[Tensor, "P *k"]:
        """One flat vector ``[P]`` from a dict over the parameters, row-major; entries ``[*shape, k]`` give ``[P, k]``.

        Raises:
            ValueError: an entry is missing, unknown or of the wrong shape.
        """
        by_name = dict(d) if set(d) == set(self.names) else {clean_name(name): value for name, value in d.items()}
        missing = [name for name in self.names if name not in by_name]
        if missing or len(by_name) > len(self.names):
            known = {clean_name(name) for name in self.names} | set(self.names)
            what = f"lacks {missing[0]!r}" if missing else f"has unknown {next(n for n in by_name if n not in known)!r}"
            raise ValueError(f"a dict over the parameters {what}; expected exactly the keys {list(self.names)}")
        parts: list[Tensor] = []
        columns: int | None = None
        for index, (name, parameter) in enumerate(self._parameters.items()):
            value, shape = by_name[name], tuple(parameter.shape)
            if index == 0:
                columns = value.shape[-1] if value.ndim == parameter.ndim + 1 else None
            expected = shape if columns is None else (*shape, columns)
            if tuple(value.shape) != expected:
                raise ValueError(f"{name}: expected a tensor of shape {expected}, got {tuple(value.shape)}")
            parts.append(value.reshape(-1) if columns is None else value.reshape(parameter.numel(), columns))
        return torch.cat(parts)

    def to_dict(self, v: Float[Tensor, "P *k"]) -> dict[str, Tensor]:
        """The inverse of `to_vector`: views of v ``[P]`` shaped like the parameters (``[P, k]`` gives ``[*shape, k]``).

        Raises:
            ValueError: v has another length.
        """
        if v.ndim not in (1, 2) or v.shape[0] != self.num_parameters:
            raise ValueError(
                f"a vector over the parameters has shape [{self.num_parameters}] or [{self.num_parameters}, k]; got "
                f"{list(v.shape)}"
            )
        sizes = [p.numel() for p in self._parameters.values()]
        return {
            name: part.reshape((*parameter.shape, *v.shape[1:]))
            for (name, parameter), part in zip(self._parameters.items(), v.split(sizes), strict=True)
        }

    def snapshot(self) -> Replay:
        """The state of buffers and generators (CPU and the model's device) now, to be entered again by ``with``."""
        return Replay(self.module)

    @contextlib.contextmanager
    def curvature_pass(self, *, once: bool = False) -> Iterator[None]:
        """Switches off what has no forward-mode or double-backward derivative, for the time of the block.

        Attention runs through PyTorch's mathematical backend, the fused encoder fast path is off, recurrent layers run
        without oneDNN, and compiled parts run eagerly (hooks fire, donated buffers stay). Everything is restored.

        Args:
            once: the graph is differentiated backwards alone, and its derivatives are not differentiated again:
                attention may then be fused.
        """
        with contextlib.ExitStack() as stack:
            if not once:
                stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            fastpath = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            if self._has_rnn:
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # Without the compiler loaded nothing is compiled, and loading it takes a second.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _checked(self, z: Any) -> Tensor:
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model returned {type(z).__name__} where one tensor z is expected; pass "
                "forward=lambda model, inputs: ... that calls the model and returns the tensor"
            )
        return z

    @contextlib.contextmanager
    def _explained(self, inputs: Any) -> Iterator[None]:
        """Turns failures on inputs of another device or dtype into errors that say so."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            device, dtype = self.device, self.dtype
            for leaf in tensor_leaves(inputs):
                if leaf.device != device:
                    raise ValueError(
                        f"inputs: a tensor is on {leaf.device}, the model on {device}; move one"
                    ) from error
                integer_where_real = not leaf.is_floating_point() and "same dtype" in str(error)
                if (leaf.is_floating_point() and leaf.dtype != dtype) or integer_where_real:
                    raise ValueError(
                        f"inputs: a tensor has dtype {leaf.dtype}, the model {dtype}; convert it with .to({dtype})"
                    ) from error
            if "shapes cannot be multiplied" in str(error):
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tensor_leaves(inputs))
                raise ValueError(
                    f"inputs: the model cannot be evaluated on a batch of shape {shapes} ({str(error).strip()}); "
                    f"expected {self._expected_width()}"
                ) from error
            raise

    def _expected_width(self) -> str:
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Linear):
                return f"examples in dimension 0; layer {name!r} takes {module.in_features} features in the last one"
        return "examples in dimension 0"


def _strip_wrappers(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)
