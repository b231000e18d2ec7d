r"""``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, whose kernel runs all layers, directions and time steps at once.

Two blocks for every layer and direction, ``NAME.ih_l0`` and ``NAME.hh_l0`` (``..._l1``, ``..._l0_reverse``), and with
``proj_size`` a third, ``NAME.hr_l0``. In recorded passes alone the kernel is replaced by a loop over the steps with the
same parameters, whose linear maps can be seen; all other passes run the kernel. Every step is a use of the maps: A is
summed and G averaged over the steps, as for cells (:mod:`natgrad.layers.recurrent`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.layers.recurrent import CELLS, GatesRule

# Name of torch's kernel → that of the kernel of one step.
KERNELS = {"rnn_tanh": "rnn_tanh_cell", "rnn_relu": "rnn_relu_cell", "lstm": "lstm_cell", "gru": "gru_cell"}


class UnrolledInterceptor(TorchFunctionMode):
    """Runs a recurrent module step by step and reports the inputs and outputs of its linear maps.

    Args:
        layer: the module whose forward pass runs inside.
        seen: called for every map, with ``"ih_l0"``, ``"hh_l0"``, ``"hr_l0"``, ``"ih_l0_reverse"`` ...
    """

    def __init__(self, layer: nn.RNNBase, seen: Callable[..., None]) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything pass but the kernels of recurrent modules."""
        name = getattr(func, "__name__", "")
        if name not in KERNELS:
            return func(*args, **(kwargs or {}))
        if isinstance(args[3], bool):  # one tensor for all sequences
            x, state, weights, _, layers, dropout, training, both, batch_first = args
            lengths = None
        else:  # the steps of sequences of several lengths after each other, the longest sequences first
            x, sizes, state, weights, _, layers, dropout, training, both = args
            lengths, batch_first = sizes.tolist(), False
        self._cell = CELLS[KERNELS[name]]
        self._weights = dict(zip(self.layer._flat_weights_names, weights, strict=True))
        states = list(zip(*(part.unbind(0) for part in state), strict=True)) if name == "lstm" else state.unbind(0)
        x, last = x.transpose(0, 1) if batch_first else x, []
        for layer in range(layers):
            outputs = []
            for tail in ("", "_reverse")[: 1 + both]:
                output, final = self._direction(f"l{layer}{tail}", x, states[len(last)], lengths)
                outputs.append(output)
                last.append(final)
            x = torch.cat(outputs, dim=-1) if both else outputs[0]
            if dropout and training and layer < layers - 1:
                x = F.dropout(x, dropout)
        x = x.transpose(0, 1) if batch_first else x
        if name == "lstm":
            return x, *(torch.stack(parts) for parts in zip(*last, strict=True))
        return x, torch.stack(last)

    def _direction(self, key: str, x: Tensor, first: Any, lengths: Sequence[int] | None) -> tuple[Tensor, Any]:
        """The outputs of all steps of one layer in one direction, and its last state."""
        together = self._linear(f"ih_{key}", x, _alone if lengths is not None else _swap)
        steps = list(together.split(lengths) if lengths is not None else together.unbind(0))
        backwards = key.endswith("_reverse")
        outputs: list[Tensor] = []
        ended: list[Any] = []  # last states of sequences that are over, the longest last
        state = first
        for of_input in reversed(steps) if backwards else steps:
            if lengths is not None and backwards:  # sequences whose end is reached on the way back begin here
                now = len(_hidden(state)) if outputs else 0
                begin = _some(first, slice(now, len(of_input)))
                state = _joined([state, begin]) if outputs else begin
            elif lengths is not None and len(of_input) < len(_hidden(state)):
                ended.append(_some(state, slice(len(of_input), None)))
                state = _some(state, slice(len(of_input)))
            state = self._step(key, of_input, state, packed=lengths is not None)
            outputs.append(_hidden(state))
        if backwards:
            outputs.reverse()
        return (torch.stack if lengths is None else torch.cat)(outputs), _joined([state, *reversed(ended)])

    def _step(self, key: str, of_input: Tensor, state: Any, packed: bool) -> Any:
        arrange = _alone if packed else None
        state = self._cell(of_input, self._linear(f"hh_{key}", _hidden(state), arrange), state)
        if f"weight_hr_{key}" in self._weights:
            state = self._linear(f"hr_{key}", state[0], arrange), state[1]
        return state

    def _linear(self, key: str, a: Tensor, arrange: Callable[[Tensor], Tensor] | None) -> Tensor:
        out = F.linear(a, self._weights[f"weight_{key}"], self._weights.get(f"bias_{key}"))
        self.seen(key, a if arrange is None else arrange(a), out, None, arrange)
        return out


class UnrolledRule(GatesRule):
    """One of the linear maps of ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``; every time step is a use of it.

    Args:
        which: ``"ih_l0"``, of the input, ``"hh_l0"``, of the hidden state, ``"hr_l0"``, to the projected state ...
    """

    interceptor = UnrolledInterceptor
    shares = False


def rules_of(layer: nn.RNNBase) -> dict[str, UnrolledRule]:
    """The rules of all linear maps of a recurrent module, by their names."""
    maps = [name.removeprefix("weight_") for name in layer._flat_weights_names if name.startswith("weight_")]
    return {which: UnrolledRule(which) for which in maps}


def _swap(x: Tensor) -> Tensor:
    """Examples first."""
    return x.transpose(0, 1)


def _alone(x: Tensor) -> Tensor:
    """Rows of a packed batch, which do not say whose they are: positions of one."""
    return x.unsqueeze(0)


def _hidden(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def _some(state: Any, rows: slice) -> Any:
    return tuple(part[rows] for part in state) if isinstance(state, tuple) else state[rows]


def _joined(states: Sequence[Any]) -> Any:
    """States of several groups of sequences as one."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(list(states))
