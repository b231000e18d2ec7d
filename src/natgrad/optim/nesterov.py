"""Nesterov's accelerated gradient with the momentum schedule of Sutskever et al. (2013): the papers' baseline."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices


def momentum_schedule(t: int, mu_max: float) -> float:
    """μ_t = min(1 - 2^(-1 - log2(floor(t/250) + 1)), mu_max): ½, ¾, ⅚, ⅞ … for 250 updates each; t counts from 0."""
    return min(1.0 - 0.5 / (t // 250 + 1), mu_max)


class NesterovSGD(torch.optim.Optimizer):
    """Nesterov's accelerated gradient in the form and with the momentum of Sutskever et al.

        v_{t+1} = μ_t v_t - lr_t ∇h(θ_t + μ_t v_t),   θ_{t+1} = θ_t + v_{t+1},
        μ_t = min(1 - 2^(-1 - log2(floor(t/250) + 1)), mu_max)

    (I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013, eqs. 3-5), the first-order baseline of [KFAC, sec. 13].

    The model's parameters hold the look-ahead point x_t = θ_t + μ_t v_t, where the gradient is taken, so that an
    ordinary training loop is right; x_{t+1} = x_t - lr_t ∇h(x_t) + μ_{t+1} v_{t+1}. (`torch.optim.SGD(nesterov=True)`
    holds the same point, for a constant momentum.) The update runs in torch's fused SGD kernel.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, at least 0. It may change at any update (`lr_scheduler`): the velocity v is a distance and
            is not rescaled by it, unlike in `torch.optim.SGD`.
        mu_max: Bound of the momentum, in [0, 1). It may be changed in `param_groups`, as the authors do when they
            lower it to 0.9 for the last updates.

    Raises:
        ValueError: `lr` or `mu_max` out of range, or sparse gradients at `step`.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, mu_max: float = 0.99) -> None:
        _check(lr, mu_max)
        super().__init__(params, {"lr": lr, "mu_max": mu_max, "t": 0, "mu": 0.0, "scale": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its momentum schedule starts with its own first update."""
        _check(param_group.get("lr", self.defaults["lr"]), param_group.get("mu_max", self.defaults["mu_max"]))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; with a `closure` that computes the loss and its gradient, returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        """One update of a group, on buffers b = -v / scale, where `scale` is the learning rate of the last update.

        torch's kernel computes b ← m b + ∇h, x ← x - lr (∇h + m b) with one momentum m. With m = μ_{t+1} and b
        multiplied beforehand by (μ_t / μ_{t+1}) (scale / lr), which is 1 but for one update in 250 at a constant
        learning rate, that is the update in the docstring.
        """
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients: list[Tensor] = [p.grad for p in parameters]
        if any(g.is_sparse for g in gradients):
            raise ValueError("NesterovSGD does not take sparse gradients: build the embedding with sparse=False")
        for p in parameters:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        mu_now = group["mu"]  # of the look-ahead that the parameters hold, also if mu_max was changed meanwhile
        mu_next = momentum_schedule(group["t"] + 1, group["mu_max"])
        lr, scale = float(group["lr"]), group["scale"]
        if lr > 0.0 and mu_next > 0.0:
            self._rescale_others(group, parameters, scale / lr)
            if (factor := mu_now / mu_next * (scale / lr)) != 1.0:
                torch._foreach_mul_(buffers, factor)
            group["scale"] = lr
            fused = _fusable(parameters)
            sgd(
                parameters,
                gradients,
                buffers,
                weight_decay=0.0,
                momentum=mu_next,
                lr=lr,
                dampening=0.0,
                nesterov=True,
                maximize=False,
                fused=fused,
                foreach=not fused,
            )
        else:  # without momentum, or coasting at lr = 0, where b = -v / lr is not defined: keep the last scale
            if lr > 0.0:
                self._rescale_others(group, parameters, scale / lr)
                group["scale"] = lr
            torch._foreach_mul_(buffers, mu_now * (scale / lr if lr > 0.0 else 1.0))
            if lr > 0.0:
                torch._foreach_add_(buffers, gradients)
                torch._foreach_add_(parameters, gradients, alpha=-lr)
            torch._foreach_add_(parameters, buffers, alpha=-mu_next * group["scale"])
        group["mu"] = mu_next
        group["t"] += 1

    def _rescale_others(self, group: dict[str, Any], stepped: list[Tensor], factor: float) -> None:
        """Keep the velocities of parameters without a gradient as they are when the group's scale changes."""
        if factor != 1.0 and len(stepped) < len(group["params"]):
            for p in group["params"]:
                if p.grad is None and p in self.state:
                    self.state[p]["momentum_buffer"].mul_(factor)


def _check(lr: float, mu_max: float) -> None:
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; expected a finite learning rate of at least 0, for example 0.003")
    if not 0.0 <= mu_max < 1.0:
        raise ValueError(f"mu_max is {mu_max}; expected a momentum in [0, 1), for example 0.99")


def _fusable(parameters: list[Tensor]) -> bool:
    """Whether torch has a fused kernel for all of them."""
    devices = _get_fused_kernels_supported_devices()
    return all(p.device.type in devices and torch.is_floating_point(p) for p in parameters)
