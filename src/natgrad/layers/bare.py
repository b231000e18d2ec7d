"""Parameters that a module of your own uses as it likes: the diagonal of their curvature."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from natgrad.layers.rules import Block, DiagonalRule, Use


class BareRule(DiagonalRule):
    r"""One parameter, known by its gradient alone.

    With targets that the model draws, ``E (Σ_n ∇_n)² = Σ_n E ∇_n²``, for the scores of different examples are
    independent and have mean zero: the square of the batch's gradient is an unbiased estimate, from the backward pass
    that is made anyway. Other expectations take one backward pass per example.

    Args:
        attribute: of the module that holds the parameter; of one of them where several do.
        reason: why no other rule covers it, for a table; None for a parameter of a module of your own.
    """

    captured = False

    def __init__(self, attribute: str, reason: str | None = None) -> None:
        self.attributes, self.reason = (attribute,), reason

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """The parameter."""
        return {self.attributes[0]: layer._parameters[self.attributes[0]]}

    def per_example(self, block: Block, use: Use, g: Tensor) -> Float[Tensor, "examples columns"]:
        """Never called: nothing is captured."""
        raise NotImplementedError("a bare parameter has no calls")

    def shape(self, layer: Any, names: Sequence[str]) -> tuple[int, ...]:
        """(1, number of elements)."""
        return 1, self.parameters(layer)[self.attributes[0]].numel()

    def describe(self, block: Block) -> str:
        """Diagonal, and of what."""
        return f"diagonal ({self.reason or f'parameter of {type(block.layer).__name__}'})"
