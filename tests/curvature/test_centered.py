"""[NOTE] and [THESIS, ch. 6] per layer: A through C, the residual R, W and b apart, the local criterion."""

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import Factors
from natgrad.curvature.centered import (
    centered_gradient,
    centered_update,
    input_moments,
    inverse_through_covariance,
    kronecker_residual,
    local_criterion,
    local_solution,
)

IN, OUT, N = 4, 3, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


h = draw(N, IN) @ draw(IN, IN, seed=1) + torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
g = draw(N, OUT, seed=2)
ones = torch.ones(N, 1, dtype=torch.float64)
A = torch.cat([h, ones], 1).T @ torch.cat([h, ones], 1) / N
dW, db = g.T @ h / N, g.mean(0)
B = draw(OUT, OUT, seed=3) @ draw(OUT, OUT, seed=3).T + torch.eye(OUT, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_inverse_of_A_through_the_covariance() -> None:
    moments = input_moments(A)
    close(moments.mean, h.mean(0))
    close(moments.covariance, torch.cov(h.T, correction=0))
    close(inverse_through_covariance(moments), torch.linalg.inv(A))
    close(input_moments(3 * A).covariance, moments.covariance)  # a layer used three times per example


def test_the_centred_gradient_is_that_of_centred_inputs() -> None:
    centred = h - h.mean(0)
    close(centered_gradient(dW, db, h.mean(0)), g.T @ centred / N)
    weight = draw(OUT, IN, seed=4).requires_grad_()
    bias = draw(OUT, seed=5).requires_grad_()
    out = centred @ weight.T + (bias + weight.detach() @ h.mean(0))  # the same outputs from centred inputs
    nn.functional.mse_loss(out, g).backward()
    plain = weight.detach().clone().requires_grad_()
    nn.functional.mse_loss(h @ plain.T + bias, g).backward()
    twin = bias.grad / 2  # both passes added to it
    close(centered_gradient(plain.grad, twin, h.mean(0)), weight.grad)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("damp_bias", [True, False])
@pytest.mark.parametrize("factor", ["B", "alpha"])
def test_updates_equal_the_dense_inverse(damping: float, damp_bias: bool, factor: str) -> None:
    G = B if factor == "B" else 2.5
    damped = A + damping * torch.diag(torch.tensor([1.0] * IN + [float(damp_bias)], dtype=torch.float64))
    dense_G = B if factor == "B" else 2.5 * torch.eye(OUT, dtype=torch.float64)
    gradient = torch.cat([dW, db[:, None]], 1).T.reshape(-1)  # columns of [W b] stacked
    expected = torch.linalg.solve(torch.kron(damped, dense_G), gradient).reshape(IN + 1, OUT).T
    found = centered_update(dW, db, input_moments(A), G, damping=damping, damp_bias=damp_bias)
    close(found.weight, expected[:, :-1])
    close(found.bias, expected[:, -1])
    plain = centered_update(dW, db, input_moments(A), G, damping=damping, damp_bias=damp_bias, plain_bias=True)
    close(plain.weight, found.weight)
    close(plain.bias, torch.linalg.solve(dense_G, db))
    assert (plain.bias - found.bias).abs().max() > 0.05


def test_the_printed_scalar_of_the_bias_update() -> None:
    """``E[(1 − h̄ᵀ C^{-1} (h − h̄)) B^{-1} ∇_a l]`` [NOTE, sec. 4.3], example by example."""
    mean, C = input_moments(A)
    scalar = 1 - (h - mean) @ torch.linalg.solve(C, mean)
    expected = (scalar[:, None] * torch.linalg.solve(B, g.T).T).mean(0)
    close(centered_update(dW, db, input_moments(A), B).bias, expected)


@pytest.mark.parametrize(("damping", "lr"), [(0.0, 1.0), (0.4, 0.7)])
def test_the_local_criterion_meets_the_second_order_derivation(damping: float, lr: float) -> None:
    """ε = κ and an undamped bias: [THESIS, sec. 6.1] and [THESIS, sec. 6.3.2] give one update."""
    found = local_solution(h, g, lr=lr, damping=damping)
    second_order = centered_update(dW, db, input_moments(A), 1.0, damping=damping, damp_bias=False)
    close(found.weight, -lr * second_order.weight)
    close(found.bias, -lr * second_order.bias)
    W, b = (x.clone().requires_grad_() for x in found)
    local_criterion(W, b, h, g, lr=lr, damping=damping).backward()
    close(W.grad, torch.zeros_like(W))
    close(b.grad, torch.zeros_like(b))
    value = local_criterion(*found, h, g, lr=lr, damping=damping)
    assert local_criterion(1.01 * found.weight, found.bias, h, g, lr=lr, damping=damping) > value
    by_loop = sum((W.detach() @ h[i] + b.detach() + lr * g[i]).square().sum() for i in range(N)) / N
    close(value, by_loop + damping * W.detach().square().sum())


@pytest.mark.parametrize("likelihood", [ng.Gaussian(), ng.Bernoulli(), ng.Categorical()], ids=repr)
def test_the_residual_of_every_layer(likelihood: ng.Likelihood) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = draw(7, 3, seed=6)
    exact = ng.kronecker_fisher(model, likelihood, x, structure="exact_block")
    kfac = ng.kronecker_fisher(model, likelihood, x, structure="block_diagonal")
    block, product = exact.to_dense(order="vec"), kfac.to_dense(order="vec")
    z = model(x)
    start = 0
    for name, layer in (("0", model[0]), ("2", model[2])):
        size = layer.weight.numel() + layer.out_features
        part = slice(start, start + size)
        R = kronecker_residual(block[part, part], kfac.factors[name])
        close(R, block[part, part] - product[part, part])
        expected = torch.zeros_like(R)
        for i in range(len(x)):  # E[(ā āᵀ − A) ⊗ (JᵀF_R J − G)], example by example
            a = torch.cat([x[i] if name == "0" else torch.tanh(model[0](x[i])), torch.ones(1, dtype=x.dtype)]).detach()

            def rest(s: Tensor, name: str = name) -> Tensor:
                return model[2](torch.tanh(s)) if name == "0" else s

            s = model[0](x[i]) if name == "0" else z[i]
            J = torch.autograd.functional.jacobian(rest, s.detach())
            S = likelihood.fisher_factor(z[i : i + 1].detach())[0]
            local = J.T @ S @ S.T @ J
            f = kfac.factors[name]
            G = f.G if isinstance(f.G, Tensor) else f.G.to_dense()
            expected += torch.kron(torch.outer(a, a) - f.A, local - G) / len(x)
        close(R, expected)
        corner = R[-layer.out_features :, -layer.out_features :]
        close(corner, torch.zeros_like(corner))
        if name == "0":
            assert R.abs().max() > 1e-3
        start += size
    if isinstance(likelihood, ng.Gaussian):  # the last layer's g gᵀ does not vary: nothing is neglected
        close(R, torch.zeros_like(R))


def test_what_is_refused() -> None:
    singular = h.clone()
    singular[:, 1] = 2.0
    wide = torch.cat([singular, ones], 1)
    moments = input_moments(wide.T @ wide / N)
    with pytest.raises(ValueError, match="the covariance of the layer's input .* singular"):
        inverse_through_covariance(moments)
    with pytest.raises(ValueError, match="damping=-1"):
        centered_update(dW, db, moments, damping=-1.0)
    with pytest.raises(ValueError, match="block: expected a matrix of 15 rows"):
        kronecker_residual(torch.eye(4, dtype=torch.float64), Factors(A, B))
