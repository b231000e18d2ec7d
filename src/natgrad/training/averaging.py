"""The running average of the iterates that the papers report [KFAC, sec. 13]."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class IterateAverage(AveragedModel):
    """The average θ̄_k = ξ_k θ̄_{k-1} + (1 - ξ_k) θ_k with ξ_k = min(1 - 1/k, ξ) [KFAC, sec. 13].

    The plain mean of the first 1/(1-ξ) iterates, then an exponentially decayed one. (The paper has a constant ξ and
    does not say how its average starts; this ramp, which it uses for A and G, keeps the first iterate from counting
    more than those after it.) Call `update_parameters(model)` after each update; `module` is a copy of the model that
    holds θ̄ (the initial parameters before the first update), ready to be evaluated. Buffers are those of the latest
    iterate. The papers report the better of θ and θ̄ on the training data.

    A `torch.optim.swa_utils.AveragedModel`: `state_dict` and `load_state_dict` save and restore it, and
    `torch.optim.swa_utils.update_bn` recomputes batch-norm statistics for θ̄.

    Args:
        model: The model that is trained; it is copied, not changed.
        xi: The largest ξ_k, in [0, 1).

    Raises:
        ValueError: `xi` outside [0, 1).
    """

    def __init__(self, model: nn.Module, xi: float = 0.99) -> None:
        if not 0.0 <= xi < 1.0:
            raise ValueError(f"xi is {xi}; expected a decay in [0, 1), for example 0.99")
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(xi))
        self.xi = xi
        self.module.zero_grad(set_to_none=True)  # the copy came with the model's gradients

    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's parameters into the average."""
        k = int(self.n_averaged) + 1
        self.multi_avg_fn = get_ema_multi_avg_fn(min(1.0 - 1.0 / k, self.xi))
        super().update_parameters(model)
