"""Many small autoencoders trained at once by SGD, each with a learning rate and an initial variance of its own."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def final_costs(
    x: Float[Tensor, "cases pixels"],
    sizes: Sequence[int],
    lr: Float[Tensor, "networks"],
    alpha: Float[Tensor, "networks"],
    *,
    batch: int,
    iterations: int,
    generator: torch.Generator,
) -> Float[Tensor, "networks"]:
    """Cost E ‖f(x) − x‖² over all cases after so many iterations of SGD from random weights; NaN where it diverged.

    Hidden units are tanh, the code (the narrowest layer) and the output are linear. Weights are uniform with variance
    α / (n_in + n_out) [THESIS, sec. 2.4.2], biases 0.

    Args:
        x: Images; inputs and targets.
        sizes: Units from input to output.
        lr: Learning rates.
        alpha: α of the initial weights.
        batch: Examples per iteration, drawn with replacement, others for every network.
        iterations: Updates.
        generator: Of weights and batches, on the CPU.
    """
    k, last = len(lr), len(sizes) - 2
    code = min(range(len(sizes)), key=lambda i: sizes[i]) - 1
    weights, biases = [], []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        uniform = 2.0 * torch.rand(k, n_in, n_out, generator=generator, dtype=x.dtype) - 1.0
        scale = (3.0 * alpha / (n_in + n_out)).sqrt()  # a uniform number on [−c, c] has variance c²/3
        weights.append(uniform.to(x.device) * scale.view(k, 1, 1))
        biases.append(torch.zeros(k, 1, n_out, dtype=x.dtype, device=x.device))
    step = (lr / batch).view(k, 1, 1)
    for _ in range(iterations):
        rows = torch.randint(len(x), (k, batch), generator=generator).to(x.device)
        inputs = [x[rows]]
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            a = torch.baddbmm(b, inputs[i], w)
            inputs.append(a if i in (code, last) else a.tanh_())
        g = 2.0 * (inputs[-1] - inputs[0])
        for i in range(last, -1, -1):
            below = torch.bmm(g, weights[i].mT) if i else g
            g = step * g
            weights[i].baddbmm_(inputs[i].mT, g, alpha=-1.0)
            biases[i].sub_(g.sum(dim=1, keepdim=True))
            g = below if i == 0 or i - 1 == code else below.mul_(1.0 - inputs[i].square())
    costs = torch.zeros(k, dtype=torch.float64, device=x.device)
    for chunk in x.split(500):
        h = chunk.expand(k, -1, -1)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            a = torch.baddbmm(b, h, w)
            h = a if i in (code, last) else a.tanh()
        costs += (h - chunk).square().sum(dim=(1, 2), dtype=torch.float64)
    costs /= len(x)
    return torch.where(costs.isfinite(), costs, math.nan)
