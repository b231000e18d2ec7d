r"""``Y = B' W A``: the linear network whose Hessian is a Kronecker product [NEWTON].

With ``e = Ŷ − B' W A`` and ``J = ½ tr(e' e)`` the gradient is ``G = −B e A'`` and the Hessian, on the stacked columns
of W, is ``H = A A' ⊗ B B'``; Newton's step is ``W − (B B')^{-1} G (A A')^{-1}``. Where W is tied, as in a convolution,
the Hessian is ``K' (A A' ⊗ B B') K`` and its inverse does not distribute.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from natgrad.linalg.spd import spd_inverse


def bilinear_gradient(
    W: Float[Tensor, "out columns"],
    A: Float[Tensor, "columns n"],
    B: Float[Tensor, "out p"],
    Y: Float[Tensor, "p n"],
) -> Float[Tensor, "out columns"]:
    """``−B (Y − B' W A) A'``: the gradient of ``½ ‖Y − B' W A‖²``."""
    return -B @ (Y - B.T @ W @ A) @ A.T


def bilinear_newton_step(
    W: Float[Tensor, "out columns"],
    A: Float[Tensor, "columns n"],
    B: Float[Tensor, "out p"],
    Y: Float[Tensor, "p n"],
) -> Float[Tensor, "out columns"]:
    """W after one exact Newton step on ``½ ‖Y − B' W A‖²``: a minimum [NEWTON, "Linear Network"].

    Args:
        W: the parameter.
        A: inputs as columns; full row rank.
        B: what the outputs of W are multiplied by, transposed; full row rank.
        Y: what ``B' W A`` should be.

    Raises:
        ValueError: ``A A'`` or ``B B'`` is singular: Newton's step is not unique.
    """
    if W.shape != (B.shape[0], A.shape[0]) or Y.shape != (B.shape[1], A.shape[1]):
        raise ValueError(
            f"B' W A: W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)} and Y {tuple(Y.shape)} do not fit; "
            "expected W [out, in], A [in, n], B [out, p], Y [p, n]"
        )
    inverses = []
    for what, M in (("A", A), ("B", B)):
        try:
            inverses.append(spd_inverse(M @ M.T, check=True).value)
        except ValueError as error:
            raise ValueError(
                f"{what} {what}' is singular or not finite, and Newton's step not unique: expected {what} "
                f"{tuple(M.shape)} with linearly independent rows"
            ) from error
    right, left = inverses
    return W - left @ bilinear_gradient(W, A, B, Y) @ right


def bilinear_hessian(A: Float[Tensor, "columns n"], B: Float[Tensor, "out p"]) -> Float[Tensor, "size size"]:
    """``A A' ⊗ B B'``, on the stacked columns of W."""
    return torch.kron((A @ A.T).contiguous(), (B @ B.T).contiguous())


def summed_hessian(
    A: Sequence[Float[Tensor, "columns n"]], B: Sequence[Float[Tensor, "out p"]]
) -> Float[Tensor, "size size"]:
    """``Σ_i A_i A_i' ⊗ B_i B_i'``: for examples with an A and a B of their own [NEWTON, "Piecewise Linear Network"].

    Raises:
        ValueError: not one B for each A.
    """
    _check_pairs(A, B)
    return torch.stack([bilinear_hessian(a, b) for a, b in zip(A, B, strict=True)]).sum(0)


def kronecker_approximation(
    A: Sequence[Float[Tensor, "columns n"]], B: Sequence[Float[Tensor, "out p"]]
) -> Float[Tensor, "size size"]:
    """``1/n (Σ_i A_i A_i') ⊗ (Σ_i B_i B_i')``: that of :func:`summed_hessian`. The 1/n is missing in print.

    Raises:
        ValueError: not one B for each A.
    """
    _check_pairs(A, B)
    left = torch.stack([a @ a.T for a in A]).sum(0)
    right = torch.stack([b @ b.T for b in B]).sum(0)
    return torch.kron(left, right) / len(A)


def tied_hessian(
    K: Float[Tensor, "size free"], A: Float[Tensor, "columns n"], B: Float[Tensor, "out p"]
) -> Float[Tensor, "free free"]:
    """``K' (A A' ⊗ B B') K``: the Hessian in u where ``vec(W) = K u`` [NEWTON, "Convolutional Network"].

    Raises:
        ValueError: K has not one row for each entry of W.
    """
    _check_tiling(K, A, B)
    return K.T @ bilinear_hessian(A, B) @ K


def distributed_inverse(
    K: Float[Tensor, "size free"], A: Float[Tensor, "columns n"], B: Float[Tensor, "out p"]
) -> Float[Tensor, "free free"]:
    """``K⁺ ((A A')^{-1} ⊗ (B B')^{-1}) K⁺'``: what the inverse of :func:`tied_hessian` is *not*.

    It is the inverse only where K is square. It is here to see how far off it is.

    Raises:
        ValueError: K has not one row for each entry of W, or ``A A'`` or ``B B'`` is singular.
    """
    _check_tiling(K, A, B)
    pseudo = torch.linalg.pinv(K)
    inverses = [spd_inverse(M @ M.T, check=True, what=what).value for M, what in ((A, "A A'"), (B, "B B'"))]
    return pseudo @ torch.kron(*inverses) @ pseudo.T


def convolution_tiling(
    kernel: tuple[int, int, int, int], image: tuple[int, int], *, stride: int = 1, padding: int = 0
) -> Float[Tensor, "size free"]:
    """K with ``vec(W) = K vec(U)``: the matrix W of a convolution from its kernel U.

    W ``[out·height'·width', in·height·width]`` maps images flattened row-major to such images; vec stacks its columns.
    U is flattened row-major, as PyTorch stores it.

    Args:
        kernel: shape of U, ``(out, in, rows, columns)``.
        image: ``(height, width)`` of the input.
        stride: of the convolution.
        padding: zeros on each side.

    Returns:
        a dense matrix in float64: for small cases.
    """
    size, (height, width) = torch.Size(kernel).numel(), image
    inputs = kernel[1] * height * width
    one_hot = torch.eye(inputs, dtype=torch.float64).reshape(inputs, kernel[1], height, width)
    columns = []
    for index in range(size):
        U = torch.zeros(size, dtype=torch.float64)
        U[index] = 1.0
        images = F.conv2d(one_hot, U.reshape(kernel), stride=stride, padding=padding)
        columns.append(images.reshape(-1))  # row i is W's column i: its columns stacked
    return torch.stack(columns, dim=1)


def _check_pairs(A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
    if len(A) != len(B) or not A:
        raise ValueError(f"A, B: expected one B for each A, and at least one; got {len(A)} and {len(B)}")


def _check_tiling(K: Tensor, A: Tensor, B: Tensor) -> None:
    size = A.shape[0] * B.shape[0]
    if K.ndim != 2 or K.shape[0] != size:
        raise ValueError(
            f"K: expected [{size}, free], a row for each entry of W [{B.shape[0]}, {A.shape[0]}]; got {list(K.shape)}"
        )
