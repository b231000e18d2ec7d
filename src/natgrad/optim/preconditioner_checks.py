"""What a `Preconditioner` refuses: models that changed, calls that cannot mean what was meant."""

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from natgrad.layers.rules import Block
from natgrad.model_view import clean_name


def check_output(z: object) -> None:
    """Refuse what is no output of a model.

    Raises:
        TypeError: z is no tensor with a dimension of examples.
        RuntimeError: as :func:`refuse_transforms`.
    """
    refuse_transforms()
    if not isinstance(z, Tensor) or z.ndim == 0:
        raise TypeError("z: expected the model's output, a tensor with the examples in dimension 0")


def refuse_transforms() -> None:
    """Refuse calls from inside ``torch.func``.

    Raises:
        RuntimeError: a transform is at work, whose tensors have no graph that hooks could see.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "observe(z) or update(x) inside a transform of torch.func (grad, vmap, jvp ...), whose tensors have no "
            "graph; call update(x) outside of it"
        )


def refuse_shards(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters of which every rank has a part: factors of a part of a layer would be those of another layer.

    Raises:
        ValueError: there are some; one is named.
    """
    for name, p in parameters.items():
        if "DTensor" in (type(p).__name__, type(p.data).__name__):
            raise ValueError(
                f"{name}: sharded over ranks (a DTensor), which has no factors; use DistributedDataParallel, or leave "
                "it whole"
            )


class Unchanged:
    """The parameters that a model had when its layers were covered.

    Args:
        model: without wrappers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._known = {clean_name(name): weakref.ref(p) for name, p in model.named_parameters()}
        self._kinds = {clean_name(name): _kind(p) for name, p in model.named_parameters()}

    def check(self, blocks: Mapping[str, Block]) -> None:
        """Refuse a model whose parameters are others by now.

        Raises:
            ValueError: a parameter is new or gone, of another precision or on another device, or one of a covered
                layer was frozen or unfrozen; it is named.
        """
        model = self._model()
        now = {} if model is None else {clean_name(name): p for name, p in model.named_parameters()}
        changed = [n for n, p in now.items() if n not in self._known or self._known[n]() is not p]
        changed += [name for name in self._known if name not in now]
        if changed:
            raise ValueError(
                f"{changed[0]}: this parameter was added, replaced or removed since the Preconditioner was made, so "
                "that its layers are no longer those of the model; make a new Preconditioner"
            )
        for name, p in now.items():
            if _kind(p) != self._kinds[name]:
                (dtype, device), (other, elsewhere) = self._kinds[name], _kind(p)
                raise ValueError(
                    f"{name}: when the Preconditioner was made its statistics were to be {dtype} on {device}, now they "
                    f"would be {other} on {elsewhere}; move or convert the model first, then make the Preconditioner"
                )
        for name, block in blocks.items():
            if block.trained != tuple(block.members):
                raise ValueError(
                    f"layer {name!r}: requires_grad of its parameters changed since the Preconditioner was made, so "
                    "its factors would no longer fit; make a new Preconditioner after freezing or unfreezing"
                )


def _kind(p: Tensor) -> tuple[torch.dtype, torch.device]:
    """The dtype of sums over many rows, and where they are."""
    return torch.promote_types(p.dtype, torch.float32), p.device
