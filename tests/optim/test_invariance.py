"""[KFAC, sec. 10]: K-FAC's updates do not depend on how the units are parametrised. Undamped, in float64.

The transformed network computes ``s†_i = W†_i ā†_{i-1}``, ``ā†_i = Ω_i φ̄_i(Φ_i s†_i)`` with ``ā†_0 = Ω_0 ā_0`` and
``Ω_ℓ = I``; ζ maps its parameters to ``W_i = Φ_i W†_i Ω_{i-1}``. General Ω mix the homogeneous coordinate: the layers
are bias-free, on d + 1 inputs, in both networks.
"""

import math
from collections.abc import Callable

import pytest
import torch
from oracles.kfac import FIXED
from torch import Tensor, nn

import natgrad as ng
from natgrad.optim.settings import Damping

BOTH = pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
WIDTHS = (3, 4, 3, 2)
N = 400  # many examples: the factors are regular without damping


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def invertible(n: int, seed: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) + 0.4 * draw(n, n, seed=seed)


class Network(nn.Module):
    """Bias-free layers on homogeneous inputs; with Ω and Φ the transformed network."""

    def __init__(
        self,
        weights: list[Tensor],
        omega: list[Tensor] | None = None,
        phi: list[Tensor] | None = None,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype) for W in weights)
        for layer, W in zip(self.layers, weights, strict=True):
            layer.weight.data = W.clone()
        self.omega = omega or [torch.eye(W.shape[1], dtype=W.dtype) for W in weights]
        self.phi = phi or [torch.eye(W.shape[0], dtype=W.dtype) for W in weights]
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        a = with_ones(x) @ self.omega[0].T
        for i, layer in enumerate(self.layers[:-1]):
            a = with_ones(self.activation(layer(a) @ self.phi[i].T)) @ self.omega[i + 1].T
        return self.layers[-1](a) @ self.phi[-1].T  # the linear output layer: Φ_ℓ acts before it is read

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach().clone() for layer in self.layers]


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)


def original(seed: int = 0) -> list[Tensor]:
    return [draw(o, i + 1, seed=seed + k) * 0.8 for k, (i, o) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))]


def zeta(weights: list[Tensor], omega: list[Tensor], phi: list[Tensor]) -> list[Tensor]:
    return [P @ W @ Omega for W, Omega, P in zip(weights, omega, phi, strict=True)]


def zeta_inverse(weights: list[Tensor], omega: list[Tensor], phi: list[Tensor]) -> list[Tensor]:
    solve = torch.linalg.solve
    return [solve(Omega.T, solve(P, W).T).T for W, Omega, P in zip(weights, omega, phi, strict=True)]


def transformed_pair(seed: int = 50) -> tuple[Network, Network, list[Tensor], list[Tensor]]:
    weights = original()
    omega = [invertible(W.shape[1], seed + i) for i, W in enumerate(weights)]
    phi = [invertible(W.shape[0], seed + 10 + i) for i, W in enumerate(weights)]
    return Network(weights), Network(zeta_inverse(weights, omega, phi), omega, phi), omega, phi


def natural_step(net: Network, x: Tensor, y: Tensor, structure: str, damping: float = 0.0) -> list[Tensor]:
    """−F̆^{-1} ∇h or −F̂^{-1} ∇h as matrices."""
    likelihood = ng.Gaussian()
    k = ng.kronecker_fisher(net, likelihood, x, structure=structure, expectation="exact")
    gradient = torch.autograd.grad(likelihood.nll(net(x), y), list(net.parameters()))
    step = k.inverse(damping) @ {name: g for (name, _), g in zip(net.named_parameters(), gradient, strict=True)}
    return [-step[name] for name, _ in net.named_parameters()]


@BOTH
@pytest.mark.parametrize("seed", [50, 90])
def test_theorem_1(structure: str, seed: int) -> None:
    """ζ(θ† + δ†) = θ + δ for random invertible Ω and Φ."""
    net, transformed, omega, phi = transformed_pair(seed)
    x, y = draw(N, 3, seed=1), draw(N, 2, seed=2)
    torch.testing.assert_close(transformed(x), net(x))
    step, step_there = (natural_step(n, x, y, structure) for n in (net, transformed))
    for found, expected in zip(zeta(step_there, omega, phi), step, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    # the gradient has no such property, nor has a damped update
    for other in ("gradient", "damped"):
        there, here = (
            natural_step(n, x, y, structure, 0.1)
            if other == "damped"
            else [g.neg() for g in torch.autograd.grad(ng.Gaussian().nll(n(x), y), list(n.parameters()))]
            for n in (transformed, net)
        )
        assert any((a - b).norm() > 0.03 * b.norm() for a, b in zip(zeta(there, omega, phi), here, strict=True))


def path(net: Network, x: Tensor, y: Tensor, structure: str, updates: int, **settings) -> list[Tensor]:
    """Outputs along K-FAC's path without damping; inverses at every update."""
    likelihood = ng.Gaussian()
    damping = Damping(0.0, rule=None)
    opt = ng.KFAC(net, likelihood, structure=structure, damping=damping, **{**FIXED, **settings})
    outputs = []
    for _ in range(updates):
        opt.step(x, y)
        outputs.append(net(x).detach())
    assert opt.stats["failed_inverses"] == 0
    return outputs


@BOTH
@pytest.mark.parametrize("momentum", [False, True])
def test_corollary_2(structure: str, momentum: bool) -> None:
    """The same path through the predictions, step by step; the coefficients (α, μ) do not depend on ζ either."""
    net, transformed, omega, phi = transformed_pair()
    x, y = draw(N, 3, seed=1), torch.sin(draw(N, 3, seed=1))[:, :2]
    ours, theirs = (path(n, x, y, structure, 4, momentum=momentum, seed=5) for n in (net, transformed))
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    for found, expected in zip(zeta(transformed.weights(), omega, phi), net.weights(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (ours[-1] - ours[0]).norm() > 0.05 * ours[0].norm()  # it did move


@BOTH
@pytest.mark.parametrize("bias", ["homogeneous", "nn.Linear's own"])
def test_sigmoid_and_tanh_take_the_same_path(structure: str, bias: str) -> None:
    """tanh(s) = 2 σ(2 s) − 1: Φ = ½ I before, Ω = [[½ I, ½], [0, 1]] behind turn one into the other."""
    tanh, x, y = original(), draw(N, 3, seed=1), torch.sin(draw(N, 3, seed=1))[:, :2]
    omega, phi = [torch.eye(4, dtype=torch.float64)], []
    for W in tanh[:-1]:
        d = len(W)
        Omega = torch.eye(d + 1, dtype=torch.float64) * 0.5
        Omega[:, -1] = 0.5
        Omega[-1, -1] = 1.0
        omega.append(Omega)
        phi.append(0.5 * torch.eye(d, dtype=torch.float64))
    phi.append(torch.eye(2, dtype=torch.float64))
    sigmoid = zeta_inverse(tanh, omega, phi)  # what W must be with σ as the activation
    if bias == "homogeneous":
        nets = [Network(tanh), Network(sigmoid, activation=torch.sigmoid)]
    else:
        nets = [_sequential(tanh, nn.Tanh), _sequential(sigmoid, nn.Sigmoid)]
    torch.testing.assert_close(nets[1](x), nets[0](x))
    ours, theirs = (path(net, x, y, structure, 5, seed=5) for net in nets)
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    assert (ours[-1] - ours[0]).norm() > 0.05 * ours[0].norm()


def _sequential(weights: list[Tensor], activation: Callable[[], nn.Module]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for W in weights:
        layer = nn.Linear(W.shape[1] - 1, W.shape[0], dtype=W.dtype)
        layer.weight.data, layer.bias.data = W[:, :-1].clone(), W[:, -1].clone()
        modules += [layer, activation()]
    return nn.Sequential(*modules[:-1])


def inverse_root(M: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(M)
    return Q @ torch.diag(values.rsqrt()) @ Q.T


def test_corollary_3() -> None:
    """K-FAC's update is gradient descent in the network whose a and g are centred and white.

    ``Ω = [[C^{-1/2}, −C^{-1/2} m], [0, 1]]`` with mean m and covariance C of a; ``Ω = A^{-1/2}`` whitens but does not
    centre.
    """
    net, x, y = Network(original()), draw(N, 3, seed=1), draw(N, 2, seed=2)
    factors = ng.kronecker_fisher(net, ng.Gaussian(), x, expectation="exact").factors
    omega, phi = [], []
    for f in factors.values():
        A, G = f.A.to_dense(), f.G.to_dense()
        m = A[:-1, -1]
        root = inverse_root(A[:-1, :-1] - torch.outer(m, m))
        Omega = torch.eye(len(A), dtype=A.dtype)
        Omega[:-1, :-1], Omega[:-1, -1] = root, -root @ m
        omega.append(Omega)
        phi.append(inverse_root(G))
    white = Network(zeta_inverse(net.weights(), omega, phi), omega, phi)
    torch.testing.assert_close(white(x), net(x))
    found = ng.kronecker_fisher(white, ng.Gaussian(), x, expectation="exact").factors
    for f in found.values():
        for M in (f.A.to_dense(), f.G.to_dense()):  # last column of A: mean 0; the rest: covariance I
            torch.testing.assert_close(M, torch.eye(len(M), dtype=M.dtype), rtol=1e-9, atol=1e-9)
    step = natural_step(net, x, y, "block_diagonal")
    gradient = torch.autograd.grad(ng.Gaussian().nll(white(x), y), list(white.parameters()))
    for there, here in zip(zeta([-g for g in gradient], omega, phi), step, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-9)
    other = [inverse_root(f.A.to_dense()) for f in factors.values()]
    plain = Network(zeta_inverse(net.weights(), other, phi), other, phi)
    a = with_ones(x) @ other[0].T
    torch.testing.assert_close(a.T @ a / N, torch.eye(4, dtype=a.dtype))  # white, and yet
    assert a[:, :-1].mean(0).norm() > 1e-3
    again = torch.autograd.grad(ng.Gaussian().nll(plain(x), y), list(plain.parameters()))
    for there, here in zip(zeta([-g for g in again], other, phi), step, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-9)  # the step is the same: A† = I is enough
    assert math.isclose(float(found["layers.0"].A.to_dense()[-1, -1]), 1.0)
