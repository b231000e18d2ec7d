"""The local quadratic model M that turns a direction into an update.

``M(δ) − M(0) = ∇h·δ + ½ δᵀ (F + (λ + η) I) δ`` [KFAC, eq. 5; sec. 6.4; sec. 7], restricted to the span of a few
directions (the proposal Δ and the previous update δ₀), where it is a small dense problem. Everything is a tensor on the
model's device: nothing here waits for the device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """M restricted to ``δ = Σ_i c_i d_i``: ``slope · c + ½ cᵀ curvature c``.

    Args:
        slope: ``∇h · d_i``, with the l2 term in ∇h; shape [k].
        curvature: ``d_iᵀ (F + (λ + η) I) d_j``; shape [k, k].
        gram: ``d_i · d_j``, where it is needed; shape [k, k].
    """

    slope: Float[Tensor, " k"]
    curvature: Float[Tensor, "k k"]
    gram: Float[Tensor, "k k"] | None = None

    def norm(self, coefficients: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """``‖δ‖`` at the given coefficients.

        Raises:
            ValueError: there is no ``gram``.
        """
        if self.gram is None:
            raise ValueError("gram: needed for the norm of δ; make the Subspace with it")
        return (coefficients @ self.gram @ coefficients).clamp(min=0).sqrt()

    def change(self, coefficients: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """``M(δ) − M(0)`` at the given coefficients."""
        return self.slope @ coefficients + 0.5 * coefficients @ self.curvature @ coefficients


def best_step(model: Subspace) -> Float[Tensor, ""]:
    """The α that minimises M along the first direction [KFAC, sec. 6.4]; 0 where its curvature is not positive."""
    curvature = model.curvature[0, 0]
    step = -model.slope[0] / curvature
    return torch.where((curvature > 0) & torch.isfinite(step), step, torch.zeros_like(step))


def best_coefficients(model: Subspace, collinear: float | None = None) -> Float[Tensor, " k"]:
    """The (α, μ) that minimise M over span{Δ, δ₀}: the 2×2 system of [KFAC, sec. 7]; (α) where M has one direction.

    Falls back to (α, 0) of :func:`best_step` where δ₀ is zero or collinear with Δ (in the metric of M): there the
    system is singular and its solution arbitrary.

    Args:
        model: M on (Δ, δ₀), or on Δ alone.
        collinear: the system counts as singular when ``1 − cos²`` of the two directions is below this (default: the
            square root of the dtype's resolution).
    """
    if len(model.slope) == 1:
        return best_step(model)[None]
    tolerance = torch.finfo(model.slope.dtype).eps ** 0.5 if collinear is None else collinear
    first, cross, second = model.curvature[0, 0], model.curvature[0, 1], model.curvature[1, 1]
    determinant = first * second - cross * cross
    alpha = -(second * model.slope[0] - cross * model.slope[1]) / determinant
    mu = -(first * model.slope[1] - cross * model.slope[0]) / determinant
    regular = (first > 0) & (second > 0) & (determinant > tolerance * first * second)
    pair = torch.stack((alpha, mu))
    single = torch.stack((best_step(model), torch.zeros_like(mu)))
    return torch.where(regular & torch.isfinite(pair).all(), pair, single)


def part_coefficients(model: Subspace, ridge: float, least: float) -> Float[Tensor, " k"]:
    r"""How much of each part to take of a direction ``d = Σ_l d_l``.

    ``c`` minimises ``slope · c + ½ cᵀ (C + ridge · diag(C)) c``: the ridge is for a curvature C that is known from a
    few rows only. No ``c_l`` is less than the share ``least`` of ``−slope_l / C_ll``, what the part would get alone.
    The result is scaled such that ``∇h · Σ c_l d_l = ∇h · d``. A part that has no slope below zero or no curvature gets
    the mean of the others.

    Args:
        model: M on the parts.
        ridge: see above; positive.
        least: see above; at least 0.

    Returns:
        the coefficients; not a number where no part has a slope below zero.
    """
    curvature = model.curvature.diagonal()
    own = -model.slope / curvature
    telling = torch.isfinite(own) & (own > 0) & (curvature > 0)
    # a row and column of the identity in the place of those of a part that tells nothing
    system = torch.where(telling[:, None] & telling, model.curvature, 0.0)
    system = system + torch.diag(torch.where(telling, ridge * curvature, 1.0))
    joint, info = torch.linalg.solve_ex(system, torch.where(telling, -model.slope, 0.0))
    found = torch.where((info == 0) & torch.isfinite(joint).all(), joint, own)
    found = torch.where(telling, torch.maximum(found, least * own), 0.0)
    slope = torch.where(telling, model.slope, 0.0)
    found = found * slope.sum() / (slope @ found)
    return torch.where(telling, found, found.sum() / telling.sum())


def rounding_of(h: Float[Tensor, ""], dtype: torch.dtype) -> Float[Tensor, ""]:
    """What changes of h that were computed in a dtype cannot be told from.

    Args:
        h: where the change starts.
        dtype: of the parameters.
    """
    return 10 * torch.finfo(dtype).eps * h.abs()


def reduction_ratio(
    actual: Float[Tensor, ""],
    predicted: Float[Tensor, ""],
    noise: Float[Tensor, ""] | float = 0.0,
    damped: Float[Tensor, ""] | float = 0.0,
) -> Float[Tensor, ""]:
    """``ρ = (h(θ+δ) − h(θ)) / (M(δ) − M(0))`` [KFAC, sec. 6.5]: both on the same data and both with the l2 term.

    An actual change that is not finite gives −∞: the step overflowed.

    Args:
        actual: the numerator.
        predicted: the denominator.
        noise: where both are smaller, the ratio is one of rounding errors and says nothing: it is then ½, at which no
            rule moves λ (else it would grow for ever once h has converged), or 1 where λ alone makes δ so short.
        damped: the share of λ in ``δᵀ (F + (λ + η) I) δ``.
    """
    nothing = torch.where(torch.as_tensor(damped) > 0.5, 1.0, 0.5)
    ratio = torch.where(torch.maximum(actual.abs(), predicted.abs()) < noise, nothing, actual / predicted)
    return torch.where(torch.isfinite(actual), ratio, torch.full_like(ratio, -torch.inf))
