"""EKFAC of convolutions: the diagonal of the exact Fisher block in the Kronecker eigenbasis, whatever the options."""

from typing import Any

import pytest
import torch
from layers.test_convolution import CONVOLUTIONS
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature import ekfac
from natgrad.curvature.inverse import kronecker_basis


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A convolution, tanh, and a linear layer on what it gives; with ``twice`` the convolution acts on two inputs."""

    def __init__(self, convolution: nn.Module, size: tuple[int, ...], twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.twice = convolution, twice
        features = convolution(torch.zeros(1, convolution.in_channels, *size)).numel()
        self.last = nn.Linear(features, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found = torch.tanh(self.conv(x))
        if self.twice:
            found = found + self.conv(2 * x.flip(-1)).sin()
        return self.last(found.flatten(1))


def made(name: str, twice: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    make, size = CONVOLUTIONS[name]
    convolution: Any = make()
    return Net(convolution, size, twice), draw(4, convolution.in_channels, *size)


def check(model: nn.Module, likelihood: Any, x: Tensor, **options: Any) -> None:
    k = ng.kronecker_fisher(model, likelihood, x, structure="ekfac", **options)
    F = ng.Fisher(model, likelihood, x).to_dense()
    kron = ng.kronecker_fisher(model, likelihood, x, **options).to_dense()
    for (index, block), name in zip(k.blocks, k.factors, strict=True):
        Q = kronecker_basis(k.bases[name])
        exact = F[index[:, None], index]
        twin = Q @ torch.diag((Q.T @ exact @ Q).diagonal()) @ Q.T
        torch.testing.assert_close(block._dense(), twin)
        worse = (kron[index[:, None], index] - exact).norm()
        assert (twin - exact).norm() <= worse * (1 + 1e-9)
    v = draw(len(F), 2, seed=2)
    torch.testing.assert_close(k.inverse(0.2) @ (k @ v + 0.2 * v), v)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(name)
    likelihood = ng.Bernoulli(normalizer="element") if name in ("dilation", "transposed") else ng.Categorical()
    check(model, likelihood, x)
    whole = ng.kronecker_fisher(model, likelihood, x, structure="ekfac").to_dense()
    monkeypatch.setattr(ekfac, "_ELEMENTS_AT_ONCE", 1)  # one example at a time
    again = ng.kronecker_fisher(model, likelihood, x, structure="ekfac").to_dense()
    torch.testing.assert_close(again, whole)
    parts = ng.kronecker_fisher(model, likelihood, [x[:1], x[1:]], structure="ekfac")
    if name != "circular":  # its A has repeated eigenvalues, so that the basis depends on rounding
        torch.testing.assert_close(parts.to_dense(), whole)
    torch.testing.assert_close(parts.to_dense().trace(), whole.trace())


def test_used_twice_and_reduced() -> None:
    model, x = made("plain", twice=True)
    check(model, ng.Categorical(), x)
    check(model, ng.Categorical(), x, sharing="reduce")


def test_training_a_convolutional_network() -> None:
    model, x = made("stride and padding")
    x, y = draw(24, *x.shape[1:]), torch.arange(24) % 3
    opt = ng.KFAC(model, ng.Categorical(), structure="ekfac", damping=0.1)
    losses = [opt.step(x, y).item() for _ in range(15)]
    assert losses[-1] < 0.3 * losses[0] and opt.stats["rejected"] <= 2
    S = opt.proposals.inverses.scalings["conv"]
    assert S.shape == (3, 13) and S.isfinite().all() and S.min() >= 0
    pre = ng.Preconditioner(model, ng.Categorical(), structure="ekfac", damping=0.1)
    z = model(x)
    pre.observe(z)
    ng.Categorical().nll(z, y).backward()
    pre.step()
    assert model.conv.weight.grad.isfinite().all()
