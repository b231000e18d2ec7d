r"""One layer's Kronecker block with the bias written apart: everything goes through ``C = cov(h)`` [NOTE].

With h the input of a layer (without the homogeneous 1) and h̄ its mean, the factor A is ``[[M, h̄], [h̄ᵀ, 1]]``,
``M = C + h̄ h̄ᵀ``. Its inverse, and the product of the inverse with a gradient, need C^{-1} alone: centring follows
from eliminating the bias. Pure functions on one layer; gradients are ``∇W [out, in]`` and ``∇b [out]``.

Damping ``A + κ I`` (``damp_bias=True``), or κ on the diagonal of M alone (``damp_bias=False``):

- S = ``C + κ I``, with ``damp_bias`` ``C + κ I + κ/(1+κ) h̄ h̄ᵀ``;
- ``ΔW = B^{-1} (∇W − s ∇b h̄ᵀ) S^{-1}`` and ``Δb = s (B^{-1} ∇b − ΔW h̄)``, s = 1, with ``damp_bias`` ``1/(1+κ)``.

The thesis and the note print the undamped form [THESIS, eqs. 6.3.3–6.3.4; NOTE, secs. 4.2–4.3].
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.curvature.base import Factors, kron, to_dense
from natgrad.damping import check_damping
from natgrad.linalg.spd import spd_inverse


class InputMoments(NamedTuple):
    """Mean and covariance of a layer's input."""

    mean: Float[Tensor, " in"]
    covariance: Float[Tensor, "in in"]


class Update(NamedTuple):
    """A direction for a layer's weight and bias, to be subtracted."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"]


def input_moments(A: Float[Tensor, "columns columns"]) -> InputMoments:
    """h̄ and C from the factor A of a layer with a bias, which is A's last row and column.

    A layer that is used T times per example has ``A = T [[M, h̄], [h̄ᵀ, 1]]``: T is divided out.
    """
    A = A / A[-1, -1]
    mean = A[:-1, -1]
    return InputMoments(mean, A[:-1, :-1] - torch.outer(mean, mean))


def inverse_through_covariance(moments: InputMoments) -> Float[Tensor, "columns columns"]:
    """A^{-1} from C^{-1} and h̄ [NOTE, sec. 3.2; THESIS, sec. 6.3.2].

    ``[[C^{-1}, −C^{-1} h̄], [−h̄ᵀ C^{-1}, 1 + h̄ᵀ C^{-1} h̄]]``.

    Raises:
        ValueError: C is singular to working precision; then A is singular too.
    """
    inverse = spd_inverse(moments.covariance, check=True, what="the covariance of the layer's input").value
    column = inverse @ moments.mean
    corner = 1 + moments.mean @ column
    return torch.cat(
        [torch.cat([inverse, -column[:, None]], 1), torch.cat([-column, corner[None]])[None]],
    )


def centered_gradient(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"], mean: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """``E[∇_a l (h − h̄)ᵀ] = ∇W − ∇b h̄ᵀ``: a correction of rank one [THESIS, sec. 6.4.1; NOTE, sec. 4.2]."""
    return torch.addr(weight, bias, mean, alpha=-1)


def centered_update(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"],
    moments: InputMoments,
    G: Float[Tensor, "out out"] | float = 1.0,
    *,
    damping: float = 0.0,
    damp_bias: bool = True,
    plain_bias: bool = False,
) -> Update:
    r"""``((A + κ I) ⊗ G)^{-1} ∇`` through the covariance: [NOTE, secs. 4.2–4.3] and, with G = α, [THESIS, sec. 6.3.2].

    Args:
        weight: ∇W.
        bias: ∇b.
        moments: of the layer's input.
        G: the layer's other factor, damped already where it needs to be; a number stands for that multiple of I.
        damping: κ. For ``A ⊗ α I + λ I`` it is λ/α.
        damp_bias: damp the bias too.
        plain_bias: leave the weights out of the bias' update, ``Δb = G^{-1} ∇b``: the note's ablation [NOTE, sec. 4.3].

    Raises:
        ValueError: a negative damping, or a covariance that is singular to working precision.
    """
    check_damping(damping)
    mean, C = moments
    s = 1 / (1 + damping) if damp_bias else 1.0
    S = torch.addr(C, mean, mean, alpha=damping * s) if damp_bias else C
    inverse = spd_inverse(S, damping, check=True, what="the covariance of the layer's input").value

    def through_output(V: Tensor) -> Tensor:
        return torch.linalg.solve(G, V) if isinstance(G, Tensor) else V / G

    dW = through_output(torch.addr(weight, bias, mean, alpha=-s)) @ inverse
    db = through_output(bias)
    return Update(dW, db if plain_bias else s * (db - dW @ mean))


def kronecker_residual(
    block: Float[Tensor, "size size"], factors: Factors, *, damping: float = 0.0
) -> Float[Tensor, "size size"]:
    r"""What K-FAC neglects within a layer, ``R = E[ā āᵀ ⊗ g gᵀ] − A ⊗ G`` [NOTE, sec. 3.1].

    ``R = E[(ā āᵀ − A) ⊗ (g gᵀ − G)]``: its last diagonal block, that of the bias alone, is 0.

    Args:
        block: the exact block of the layer in the order of stacked columns, such as a part of
            ``kronecker_fisher(structure="exact_block").to_dense(order="vec")``.
        factors: A and G of the same examples.
        damping: subtract the damped factors instead, ``(A + κ I) ⊗ G``.

    Raises:
        ValueError: the sizes do not fit.
    """
    A, G = to_dense(factors.A), to_dense(factors.G)
    if block.shape != (A.shape[0] * G.shape[0],) * 2:
        raise ValueError(f"block: expected a matrix of {A.shape[0] * G.shape[0]} rows, got {tuple(block.shape)}")
    return block - kron(A + damping * torch.eye(len(A), dtype=A.dtype, device=A.device), G)


def local_criterion(
    dW: Float[Tensor, "out in"],
    db: Float[Tensor, " out"],
    h: Float[Tensor, "n in"],
    g: Float[Tensor, "n out"],
    *,
    lr: float = 1.0,
    damping: float = 0.0,
) -> Float[Tensor, ""]:
    r"""``1/n Σ_i ‖ΔW h_i + Δb + λ ∇_{a_i} l‖² + ε ‖ΔW‖²`` [THESIS, sec. 6.1.1].

    How far the layer's outputs, after ``W + ΔW`` and ``b + Δb``, miss a gradient step of their own.

    Args:
        dW: ΔW, added to W.
        db: Δb.
        h: the layer's inputs.
        g: per-example ``∇_a l``, not divided by n.
        lr: λ.
        damping: ε.
    """
    missed = torch.addmm(db, h, dW.T) + lr * g
    return missed.square().sum() / h.shape[0] + damping * dW.square().sum()


def local_solution(
    h: Float[Tensor, "n in"], g: Float[Tensor, "n out"], *, lr: float = 1.0, damping: float = 0.0
) -> Update:
    """The minimiser of :func:`local_criterion` in closed form, with its sign: to be added [THESIS, sec. 6.1.1].

    ``ΔW (C + ε I) = −λ E[∇_a l (h − h̄)ᵀ]`` and ``Δb = −λ E[∇_a l] − ΔW h̄``: −λ times the undamped-bias update of
    :func:`centered_update` with G = 1 and κ = ε.
    """
    mean = h.mean(0)
    centred = h - mean
    C = centred.T @ centred / h.shape[0]
    inverse = spd_inverse(C, damping, check=True, what="the covariance of the layer's input").value
    dW = -lr * (g.T @ centred / h.shape[0]) @ inverse
    return Update(dW, -lr * g.mean(0) - dW @ mean)
