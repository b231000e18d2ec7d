"""Conjugate gradients for symmetric positive definite systems (Hestenes & Stiefel 1952), preconditioned.

Every decision is made on the device: an iteration that must not count multiplies its step by zero. Only asking
whether to go on waits for the device, and ``check_every`` says how often that is.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.linalg.krylov import Progress, RelativeResidual, Solution, StoppingRule, System, Vector, all_rules
from natgrad.linalg.scale import least_square, solve_rescaled

_RUNNING, _NON_FINITE, _NEGATIVE, _INDEFINITE, _ZERO = range(5)
_NAMES = {
    _NON_FINITE: "non_finite",
    _NEGATIVE: "negative_curvature",
    _INDEFINITE: "indefinite_preconditioner",
    _ZERO: "zero_rhs",
}
_FIRST_RULE = 8
_OUT_OF_RANGE = "out_of_range"
# A product that overflows with a right-hand side above this may not with a smaller one.
_LARGE = 2.0**16


def cg(
    matvec: Any,
    b: Vector,
    tol: float = 1e-4,
    max_iters: int = 20,
    preconditioner: Any = None,
    *,
    x0: Vector | None = None,
    stop: StoppingRule | Sequence[StoppingRule] = (),
    store: Iterable[int] = (),
    check_every: int = 1,
) -> Solution:
    """Solve ``A x = b`` for a symmetric positive definite A.

    Args:
        matvec: ``v → A v``, or anything with ``@``; v has the form of b.
        b: a tensor (of any shape: one vector) or a dict of tensors.
        tol: stop when ``‖b − A x‖ ≤ tol ‖b‖``; below the resolution of the dtype, as 0 is, at that: from there on the
            recurrence is rounding.
        max_iters: the most products with A (a start x0 costs one more).
        preconditioner: ``r → M^{-1} r`` with M ≈ A symmetric positive definite, or anything with ``@``.
        x0: where to start; zero by default.
        stop: further rules, such as :class:`~natgrad.linalg.RelativeProgress`.
        store: the iterations whose iterates are kept (0 for the start), such as
            :func:`~natgrad.linalg.geometric_indices`.
        check_every: ask every so many iterations whether to go on. The result is the same; on a GPU asking makes the
            host wait, not asking makes products whose result is not used.

    Returns:
        a :class:`~natgrad.linalg.Solution`. Where a direction p has ``pᵀA p ≤ 0``, A is not positive definite: x is the
        iterate before it, ``reason`` is ``"negative_curvature"`` and ``direction`` is p.

    Raises:
        TypeError: b is no floating-point vector, or ``matvec`` can be neither called nor multiplied with.
        ValueError: a negative ``tol`` or ``max_iters``, or a vector of another form than b.
    """
    if check_every < 1:
        raise ValueError(f"check_every={check_every}: expected a positive number of iterations")
    rules = all_rules(tol, stop)
    system = System(matvec, b, max_iters, preconditioner, x0, store)
    tol = max(tol, torch.finfo(system.b.dtype).eps)
    rules = (RelativeResidual(tol), *rules[1:])
    solution = _solve(system, rules, tol, check_every, least_square(system.b.dtype))
    if solution.reason != _OUT_OF_RANGE:
        return solution
    return solve_rescaled(system, rules, lambda system, rules: _solve(system, rules, tol, check_every))


def _solve(system: System, rules: Sequence[StoppingRule], tol: float, check_every: int, least: float = 0.0) -> Solution:
    """The iterations; where squares of up to ``least``, or infinite ones, end them, the reason is "out_of_range"."""
    b, max_iters = system.b, system.max_iters
    rhs_norm = torch.linalg.vector_norm(b)
    x = torch.zeros_like(b) if system.x0 is None else torch.where(rhs_norm > 0, system.x0, 0.0)
    r = b.clone() if system.x0 is None else b - system.product(x)
    residual_norm = torch.linalg.vector_norm(r)
    values = [-0.5 * (torch.dot(x, r) + torch.dot(x, b))]
    status = torch.zeros((), dtype=torch.long, device=b.device)
    status = _first(status, residual_norm <= tol * rhs_norm, _FIRST_RULE)
    status = torch.where(rhs_norm.square() <= least, _ZERO, status)
    status = torch.where(torch.isfinite(rhs_norm) & torch.isfinite(residual_norm), status, _NON_FINITE)
    p, rz = torch.zeros_like(b), torch.zeros_like(rhs_norm)
    count = torch.zeros((), dtype=torch.long, device=b.device)
    curvature = torch.zeros_like(rhs_norm)
    kept = {0: x.clone()} if 0 in system.store else {}
    on_host = b.device.type == "cpu"
    for i in range(1, max_iters + 1):
        if (i - 1) % check_every == 0 and bool(status != _RUNNING):
            break
        z = system.precondition(r)
        rz_before, rz = rz, torch.dot(r, z) if system.preconditioned else residual_norm.square()
        status = _first(status, ~torch.isfinite(rz), _NON_FINITE)
        status = _first(status, rz <= least, _INDEFINITE)
        running = status == _RUNNING
        if on_host:  # where asking costs nothing, vectors are overwritten instead of selected
            if not running:
                break
            p = z.clone() if i == 1 else torch.addcmul(z, p, rz / rz_before, out=p)
        else:
            p = torch.where(running, z if i == 1 else torch.addcmul(z, p, rz / rz_before), p)
        Ap = system.product(p)
        pAp = torch.dot(p, Ap)
        status = _first(status, ~torch.isfinite(pAp), _NON_FINITE)
        status = _first(status, pAp <= least, _NEGATIVE)
        curvature = torch.where(running, pAp, curvature)
        running = status == _RUNNING
        if on_host and not running:
            break
        alpha = torch.where(running, rz / pAp, 0.0)
        x = x.addcmul_(p, alpha)
        if on_host:
            r = r.addcmul_(Ap, alpha, value=-1)
        else:
            r = torch.where(running, torch.addcmul(r, Ap, alpha, value=-1), r)
        residual_norm = torch.linalg.vector_norm(r)
        values.append(torch.where(running, values[-1] - 0.5 * alpha * rz, values[-1]))
        count = count + running
        if i in system.store:
            kept[i] = x.clone()
        progress = Progress(i, residual_norm, rhs_norm, values)
        for code, rule in enumerate(rules, start=_FIRST_RULE):
            status = _first(status, rule(progress), code)
    iterations, code = torch.stack((count, status)).tolist()
    reason = rules[code - _FIRST_RULE].name if code >= _FIRST_RULE else _NAMES.get(code, "max_iters")
    if least and code in _NAMES and _out_of_range(code, rhs_norm, rz, curvature, least):
        reason = _OUT_OF_RANGE
    negative = code == _NEGATIVE
    kept = {i: v for i, v in kept.items() if i < iterations} | ({iterations: x} if system.store else {})
    return Solution(
        x=system.unflatten(x),
        iterations=iterations,
        reason=reason,
        residual_norm=residual_norm,
        rhs_norm=rhs_norm,
        residual=system.unflatten(r),
        model_values=tuple(values[: iterations + 1]),
        direction=system.unflatten(p) if negative else None,
        curvature=curvature / torch.dot(p, p) if negative else None,
        iterates={i: system.unflatten(v) for i, v in kept.items()},
    )


def _out_of_range(code: int, rhs_norm: Tensor, rz: Tensor, curvature: Tensor, least: float) -> bool:
    """Whether the number that ended the iterations may be rounding, or an overflow that b is to blame for."""
    if code == _NON_FINITE:
        return bool(rhs_norm > _LARGE)
    return code == _ZERO or bool((curvature if code == _NEGATIVE else rz).abs() <= least)


def _first(status: Tensor, condition: Tensor | bool, code: int) -> Tensor:
    """The first reason to stop stays."""
    if condition is False:
        return status
    return torch.where((status == _RUNNING) & condition, code, status)
