"""Adam's moments and step on one vector, by torch's own kernel."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.adam import adam


@dataclass(frozen=True)
class AdamStep:
    """``−lr m̂ / (√v̂ + ε)`` of a gradient g and the decayed means m of g and v of g², both corrected for their start.

    With ``nesterov`` m̂ is the mean one step ahead, ``(β₁ m + (1−β₁) g) / (1 − β₁^(t+1))`` (T. Dozat, "Incorporating
    Nesterov momentum into Adam", ICLR workshop 2016).

    Args:
        betas: β₁ and β₂.
        eps: ε.
        nesterov: one step ahead.
    """

    betas: tuple[float, float]
    eps: float
    nesterov: bool = True

    def __call__(
        self,
        gradient: Float[Tensor, " n"],
        moments: tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, ""]],
        lr: float,
        finite: Bool[Tensor, ""],
        *,
        out: Float[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """The step.

        Args:
            gradient: g.
            moments: m, v and the number of steps so far, in single precision; all are changed.
            lr: the learning rate.
            finite: where it is False nothing changes; the host does not wait for it.
            out: for the step.
        """
        mean, square, taken = moments
        beta, beta2 = self.betas
        ahead = self.nesterov and beta > 0
        fused = finite.device.type in ("cpu", "cuda")
        rate: float | Tensor = lr
        if ahead:
            # β₁ m_t + (1−β₁) g = β₁² m_{t−1} + (1−β₁²) g: what the kernel makes of β₁² in the place of β₁. It corrects
            # by 1 − β₁^2t, where the weights sum to 1 − β₁^(t+1).
            rate = lr * (1 - beta ** (2 * taken + 2)) / (1 - beta ** (taken + 2))
        adam(
            [out.zero_()],
            [gradient],
            [mean],
            [square],
            [],
            [taken],
            fused=fused,
            grad_scale=None,
            found_inf=(~finite).to(torch.float32) if fused else None,
            amsgrad=False,
            beta1=beta**2 if ahead else beta,
            beta2=beta2,
            lr=rate,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
        if ahead:
            g = gradient if finite.device.type != "cuda" else torch.where(finite, gradient, mean)
            mean.lerp_(g, 1 - 1 / beta)  # m_t again
        return out
