"""What every recurrent layer has to learn, however its linear maps are seen."""

from collections.abc import Callable

import torch
from torch import nn

import natgrad as ng
from oracles.layers import draw
from oracles.preconditioning import train


def learns_a_sum(make: Callable[[], nn.Module], below: float) -> None:
    """The sign of the sum of a sequence's first feature, by KFAC and by SGD behind a Preconditioner.

    Args:
        make: a fresh model of sequences of three features, with two classes.
        below: the share of the first loss under which KFAC comes.
    """
    x = draw(64, 5, 3)
    y = (x[..., 0].sum(1) > 0).long()
    model, likelihood = make(), ng.Categorical()
    opt = ng.KFAC(model, likelihood)
    losses = [opt.step(x, y).item() for _ in range(25)]
    assert losses[-1] < below * losses[0]
    model = make()
    pre = ng.Preconditioner(model, likelihood, periods=ng.Renewal(5, (1, 2), 1))
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), pre)
    last = train(model, optimizer, likelihood, x, y, 80)[-1]
    assert last < 0.5 * losses[0] and pre.stats["bare"] == 0
