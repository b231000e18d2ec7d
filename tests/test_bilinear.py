"""Newton's step on Y = B'WA, and where the Kronecker inverse stops being one: against automatic differentiation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from natgrad.diagnostics import piecewise_linear_hessian
from natgrad.linalg import bilinear


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(W: Tensor) -> Tensor:
    return W.T.reshape(-1)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_one_newton_step_is_a_minimum(out, d, more_n, more_p) -> None:
    n, p = d + more_n, out + more_p
    W, A, B, Y = draw(out, d), draw(d, n, seed=1), draw(out, p, seed=2), draw(p, n, seed=3)

    def loss(flat: Tensor) -> Tensor:
        return 0.5 * (Y - B.T @ flat.view(d, out).T @ A).square().sum()

    flat = columns(W)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    torch.testing.assert_close(bilinear.bilinear_gradient(W, A, B, Y), gradient.view(d, out).T)
    torch.testing.assert_close(bilinear.bilinear_hessian(A, B), hessian)
    new = bilinear.bilinear_newton_step(W, A, B, Y)
    torch.testing.assert_close(columns(new), flat - torch.linalg.solve(hessian, gradient), rtol=1e-5, atol=1e-6)
    scale = gradient.norm().clamp(min=1) * torch.linalg.cond(hessian)
    assert bilinear.bilinear_gradient(new, A, B, Y).norm() < 1e-12 * scale
    if n == d and p == out:
        torch.testing.assert_close(B.T @ new @ A, Y, rtol=1e-5, atol=1e-6)


def test_newton_step_refusals() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        bilinear.bilinear_newton_step(draw(2, 3), draw(3, 4), draw(2, 2), draw(4, 2))
    with pytest.raises(ValueError, match=r"A A' is singular .*expected A \(3, 2\) with linearly independent rows"):
        bilinear.bilinear_newton_step(draw(2, 3), draw(3, 2), draw(2, 2), draw(2, 2))
    with pytest.raises(ValueError, match="B B' is singular"):
        bilinear.bilinear_newton_step(draw(2, 3), draw(3, 4), draw(2, 1), draw(1, 4))


def test_matrices_that_do_not_belong_together_are_refused() -> None:
    A, B = draw(3, 4), draw(2, 5)
    for function in (bilinear.summed_hessian, bilinear.kronecker_approximation):
        with pytest.raises(ValueError, match="one B for each A, and at least one; got 2 and 1"):
            function([A, A], [B])
        with pytest.raises(ValueError, match="got 0 and 0"):
            function([], [])
    for function in (bilinear.tied_hessian, bilinear.distributed_inverse):
        with pytest.raises(
            ValueError, match=r"K: expected \[6, free\], a row for each entry of W \[2, 3\]; got \[5, 2\]"
        ):
            function(draw(5, 2), A, B)


class ReLUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(*d).double() for d in ((3, 5), (5, 4), (4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


@pytest.mark.parametrize("layer", ["first", "middle", "last"])
def test_total_hessian_of_a_relu_network(layer) -> None:
    model, x, y = ReLUNet(), draw(9, 3), draw(9, 2, seed=1)
    module = getattr(model, layer)
    out, d = module.weight.shape
    found = piecewise_linear_hessian(model, x, layer)

    def loss(flat: Tensor) -> Tensor:
        W = flat.view(d + 1, out).T
        parts = {f"{layer}.weight": W[:, :-1], f"{layer}.bias": W[:, -1]}
        return 0.5 * (y - torch.func.functional_call(model, parts, (x,))).square().sum()

    flat = columns(torch.cat([module.weight, module.bias[:, None]], dim=1).detach())
    torch.testing.assert_close(found.total, torch.autograd.functional.hessian(loss, flat))
    # with the 1/n the approximation is K-FAC's block of the same loss (the sum over examples)
    likelihood = ng.Gaussian(normalizer="none")
    F_breve = ng.kronecker_fisher(model, likelihood, x).to_dense(order="vec")
    start = {"first": 0, "middle": 20, "last": 44}[layer]
    block = slice(start, start + len(flat))
    torch.testing.assert_close(found.approximation, F_breve[block, block])
    without = found.approximation * 9  # as printed
    assert found.relative_error == pytest.approx(float((found.total - found.approximation).norm() / found.total.norm()))
    if layer == "last":  # B is the same for all examples: the approximation is exact
        assert found.relative_error < 1e-12
    else:  # and elsewhere it is far off, on nine examples
        assert found.relative_error == pytest.approx({"first": 0.707, "middle": 0.246}[layer], rel=0.01)
    assert (without - found.total).norm() > 5 * found.total.norm()
    torch.testing.assert_close(found.approximation.trace(), torch.kron(*_moments(model, layer, x)).trace() / 9)


def _moments(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ ā āᵀ, Σ B Bᵀ) by hand."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = getattr(model, layer).register_forward_hook(lambda m, i, o: calls.append((i[0], o)))
    z = model(x)
    handle.remove()
    a, s = calls[0]
    a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1).detach()
    g = [torch.autograd.grad(z[:, k].sum(), s, retain_graph=True)[0] for k in range(z.shape[1])]
    return a.T @ a, sum(x.T @ x for x in g)


def test_unknown_layer() -> None:
    with pytest.raises(ValueError, match="layer='fc': this model's layers are 'first'"):
        piecewise_linear_hessian(ReLUNet(), draw(2, 3), "fc")


def test_sums_of_several_examples() -> None:
    A, B = [draw(3, 2, seed=i) for i in range(4)], [draw(2, 3, seed=10 + i) for i in range(4)]
    total = sum(torch.kron(a @ a.T, b @ b.T) for a, b in zip(A, B, strict=True))
    torch.testing.assert_close(bilinear.summed_hessian(A, B), total)
    same = [B[0]] * 4
    torch.testing.assert_close(bilinear.kronecker_approximation(A, same), bilinear.summed_hessian(A, same))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (1, 1)])
def test_the_tiling_makes_the_matrix_of_the_convolution(stride, padding) -> None:
    U, images = draw(2, 3, 2, 2), draw(4, 3, 3, 4, seed=1)
    K = bilinear.convolution_tiling((2, 3, 2, 2), (3, 4), stride=stride, padding=padding)
    expected = F.conv2d(images, U, stride=stride, padding=padding).reshape(4, -1)
    W = (K @ U.reshape(-1)).view(36, -1).T
    torch.testing.assert_close(images.reshape(4, -1) @ W.T, expected)


def test_distributing_the_inverse_over_a_convolution_is_wrong_and_how_far() -> None:
    """K'(AA' ⊗ BB')K against automatic differentiation; the inverse that is "distributed" is off by far."""
    kernel, image = (1, 1, 2, 2), (3, 3)
    K = bilinear.convolution_tiling(kernel, image)  # [4 · 9, 4]
    A, B, Y, u = draw(9, 20), draw(4, 6, seed=1), draw(6, 20, seed=2), draw(4, seed=3)

    def loss(u: Tensor) -> Tensor:
        images = F.conv2d(A.T.reshape(20, 1, 3, 3), u.view(kernel)).reshape(20, -1)
        return 0.5 * (Y - B.T @ images.T).square().sum()

    H = bilinear.tied_hessian(K, A, B)
    torch.testing.assert_close(H, torch.autograd.functional.hessian(loss, u))
    wrong = bilinear.distributed_inverse(K, A, B)
    off = float((wrong - torch.linalg.inv(H)).norm() / torch.linalg.inv(H).norm())
    assert off == pytest.approx(6.81, rel=0.01)  # 681 % of the norm of the inverse
    # the exact step reaches the minimum, the other makes the loss much larger
    gradient = torch.autograd.functional.jacobian(loss, u)
    best, wrong_step = (loss(u - M @ gradient) for M in (torch.linalg.inv(H), wrong))
    torch.testing.assert_close(best, loss(torch.linalg.lstsq(_design(K, A, B), columns(Y)).solution))
    assert best == pytest.approx(51.943, rel=1e-3) and best < loss(u) < wrong_step
    assert wrong_step > 80 * loss(u)  # from 319 to 25868
    # with a square K (a reparametrisation, nothing is tied) it is the inverse
    square = draw(36, 36, seed=5)
    torch.testing.assert_close(
        bilinear.distributed_inverse(square, A, B), torch.linalg.inv(bilinear.tied_hessian(square, A, B))
    )


def _design(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """vec(B'WA) = (A' ⊗ B') K u."""
    return torch.kron(A.T.contiguous(), B.T.contiguous()) @ K


def test_the_printed_form_belongs_to_a_product() -> None:
    """(I ⊗ K')(AA' ⊗ BB')(I ⊗ K) is the Hessian for W = K U, not for vec(W) = K vec(U)."""
    K, A, B, Y = draw(4, 2), draw(3, 8, seed=1), draw(4, 5, seed=2), draw(5, 8, seed=3)

    def loss(flat: Tensor) -> Tensor:
        return 0.5 * (Y - B.T @ (K @ flat.view(3, 2).T) @ A).square().sum()

    spread = torch.kron(torch.eye(3, dtype=torch.float64), K)
    hessian = torch.autograd.functional.hessian(loss, draw(6, seed=4))
    torch.testing.assert_close(bilinear.tied_hessian(spread, A, B), hessian)
    torch.testing.assert_close(spread.T @ bilinear.bilinear_hessian(A, B) @ spread, hessian)
