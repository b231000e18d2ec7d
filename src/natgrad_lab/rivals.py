"""Other libraries' optimisers with matrices for preconditioners, entered in the races as baselines."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdam(torch.optim.Muon):
    """torch's Muon on the matrices, and AdamW with the same learning rate on what Muon does not take: the biases.

    Args:
        parameters: Of the model.
        lr: With ``adjust_lr_fn="match_rms_adamw"`` steps are as long as AdamW's, so that both share one.
        weight_decay: Decoupled.
        **arguments: Those of `torch.optim.Muon`.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float = 1e-3, weight_decay: float = 0.0, **arguments: Any
    ) -> None:
        parameters = list(parameters)
        matrices, others = ([p for p in parameters if (p.ndim == 2) == of_two] for of_two in (True, False))
        arguments = {"adjust_lr_fn": "match_rms_adamw", **arguments}
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, **arguments)
        self.adam = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True) if others else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all parameters."""
        super().zero_grad(set_to_none)
        if self.adam is not None:
            self.adam.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # pyrefly: ignore[bad-override] - without a closure
        """One update of all parameters."""
        super().step()
        if self.adam is not None:
            self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {**super().state_dict(), "adam": None if self.adam is None else self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "adam"})
        if self.adam is not None:
            self.adam.load_state_dict(state_dict["adam"])


def soap(parameters: Iterable[nn.Parameter], **arguments: Any) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024) of the package pytorch_optimizer: Adam in the eigenbasis of Shampoo's preconditioner.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ValueError(
            "the optimizer 'soap' is that of the package pytorch_optimizer, which is not installed; "
            "pip install 'natgrad[bench]'"
        ) from error
    return SOAP(list(parameters), **arguments)
