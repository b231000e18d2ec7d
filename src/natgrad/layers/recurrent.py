r"""Recurrent cells, whose kernel multiplies by two weights at once.

Two blocks: ``NAME.ih``, ``W_ih x + b_ih``, and ``NAME.hh``, ``W_hh h + b_hh``, each with the pre-activations of all
gates as its output. A cell that is called once per time step is a layer that is used several times: A is summed and G
averaged over the steps (Martens, Ba and Johnson 2018 go further and model how the steps of one sequence depend on each
other). What goes into the maps and comes out is seen by computing the cell from its definition, in recorded passes
alone.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.layers.linear import LinearRule
from natgrad.layers.rules import KroneckerRule


class CellInterceptor(TorchFunctionMode):
    """Computes a recurrent cell from its definition and reports the inputs and outputs of its two linear maps.

    Args:
        layer: the cell whose forward pass runs inside.
        seen: called for both maps, with ``"ih"`` or ``"hh"``.
    """

    def __init__(self, layer: nn.RNNCellBase, seen: Callable[..., None]) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything pass but the kernels of cells."""
        cell = CELLS.get(getattr(func, "__name__", ""))
        if cell is None:
            return func(*args, **(kwargs or {}))
        given: list[Any] = [*args, None, None]
        x, state, W_ih, W_hh, b_ih, b_hh = given[:6]
        hidden = state[0] if isinstance(state, tuple | list) else state
        of_input, of_hidden = F.linear(x, W_ih, b_ih), F.linear(hidden, W_hh, b_hh)
        self.seen("ih", x, of_input, None, None)
        self.seen("hh", hidden, of_hidden, None, None)
        return cell(of_input, of_hidden, state)


class GatesRule(LinearRule):
    """One of the two linear maps of ``nn.RNNCell``, ``nn.LSTMCell`` or ``nn.GRUCell``.

    Args:
        which: ``"ih"``, of the input, or ``"hh"``, of the hidden state.
    """

    structures = KroneckerRule.structures
    captured = False
    interceptor = CellInterceptor
    features_last = False

    def __init__(self, which: str) -> None:
        self.which = which

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """Weight and bias of the map."""
        return super().parameters(self._map(layer))

    def shape(self, layer: Any, names: Any) -> tuple[int, ...]:
        """(gates, in (+1))."""
        return super().shape(self._map(layer), names)

    def to_matrix(self, layer: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """``[W b]``."""
        return super().to_matrix(self._map(layer), parts)

    def from_matrix(self, layer: Any, V: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """W and b."""
        return super().from_matrix(self._map(layer), V, names)

    def _map(self, layer: Any) -> Any:
        weight, bias = (layer._parameters.get(f"{key}_{self.which}") for key in ("weight", "bias"))
        return SimpleNamespace(weight=weight, bias=bias, _parameters={"weight": weight, "bias": bias})


def lstm(
    of_input: Float[Tensor, "N 4*d"], of_hidden: Float[Tensor, "N 4*d"], state: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """``c' = σ(f) c + σ(i) tanh(g)``, ``h' = σ(o) tanh(c')``; returns both."""
    i, f, g, o = (of_input + of_hidden).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(of_input: Float[Tensor, "N 3*d"], of_hidden: Float[Tensor, "N 3*d"], state: Tensor) -> Tensor:
    """``h' = (1 − z) n + z h`` with ``n = tanh(n_x + r n_h)``."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = of_input.chunk(3, dim=-1), of_hidden.chunk(3, dim=-1)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return n + torch.sigmoid(z_x + z_h) * (state - n)


# Name of torch's kernel → the cell, from the outputs of its two linear maps and the state.
CELLS: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "rnn_tanh_cell": lambda of_input, of_hidden, state: torch.tanh(of_input + of_hidden),
    "rnn_relu_cell": lambda of_input, of_hidden, state: torch.relu(of_input + of_hidden),
    "lstm_cell": lstm,
    "gru_cell": gru,
}
