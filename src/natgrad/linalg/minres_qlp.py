"""MINRES-QLP: minimum-length solutions of symmetric systems, singular or not, definite or not.

Choi, Paige & Saunders (2011), MINRES-QLP: a Krylov subspace method for indefinite or singular symmetric systems, SIAM
J. Sci. Comput. 33(4), 1810-1836. Lanczos vectors v_k with ``A V_k = V_{k+1} T_k``; reflections from the left make T_k
upper triangular, reflections from the right make that lower triangular, ``Q_k T_k P_k = L_k``; and ``x_k = W_k u_k``
with ``W_k = V_k P_k`` orthonormal and ``L_k u_k = t_k``. A last diagonal element γ_k that is negligible shows that T_k
is singular, and dropping the last component of u_k then leaves the solution of minimum length.

The two coefficients of every Lanczos step are read by the host, which decides on them; the vectors stay where they are
(:mod:`natgrad.linalg.minres_vectors`).
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.krylov import Progress, Solution, StoppingRule, System, Vector, all_rules
from natgrad.linalg.minres_vectors import MinresVectors
from natgrad.linalg.scale import least_square, solve_rescaled


def minres_qlp(
    matvec: Any,
    b: Vector,
    tol: float = 1e-4,
    max_iters: int = 20,
    preconditioner: Any = None,
    *,
    x0: Vector | None = None,
    stop: StoppingRule | Sequence[StoppingRule] = (),
    store: Iterable[int] = (),
    max_condition: float | None = None,
) -> Solution:
    """The x of minimum length among those that minimise ``‖b − A x‖``, for a symmetric A.

    Args:
        matvec: ``v → A v``, or anything with ``@``; v has the form of b.
        b: a tensor (of any shape: one vector) or a dict of tensors.
        tol: stop when ``‖r‖ ≤ tol ‖b‖``, or when ``‖A r‖ ≤ tol ‖A‖ ‖r‖``: the system is incompatible and x a
            least-squares solution (with a preconditioner M: in the norms of the preconditioned system).
        max_iters: the most products with A (a start x0 costs one more, and a system without a solution two).
        preconditioner: ``r → M^{-1} r`` with M symmetric positive definite, or anything with ``@``. For a singular A
            the length is then ``√(xᵀM x)``, and the least squares are those of ``√(rᵀM^{-1} r)``.
        x0: where to start; the correction x − x0 is of minimum length.
        stop: further rules.
        store: the iterations whose iterates are kept (0 for the start).
        max_condition: stop when the condition of T_k exceeds this (default: 0.1 / the resolution of the dtype).

    Returns:
        a :class:`~natgrad.linalg.Solution`.

    Raises:
        TypeError: b is no floating-point vector, or ``matvec`` can be neither called nor multiplied with.
        ValueError: a negative ``tol`` or ``max_iters``, or a vector of another form than b.
    """
    rules = all_rules(tol, stop)
    system = System(matvec, b, max_iters, preconditioner, x0, store)

    def solve(system: System, rules: Sequence[StoppingRule], least: float = 0.0) -> Solution:
        run = _Run(system, rules, tol, max_condition)
        reason = run.begin(least)
        while reason is None and run.k < max_iters:
            reason = run.iterate()
        return run.solution(reason or "max_iters")

    solution = solve(system, rules, least_square(system.b.dtype))
    return solution if solution.reason != _OUT_OF_RANGE else solve_rescaled(system, rules, solve)


_OUT_OF_RANGE = "out_of_range"
# What is smaller than so many times the resolution, relative to ‖A‖, is rounding.
_NOISE = 100.0


class _Run:
    """One solve: what is decided on it, and what is reported."""

    def __init__(self, system: System, rules: Sequence[StoppingRule], tol: float, max_condition: float | None) -> None:
        self.system, self.rules, self.tol = system, rules, tol
        self.eps, self.least = torch.finfo(system.b.dtype).eps, least_square(system.b.dtype)
        self.max_condition = 0.1 / self.eps if max_condition is None else max_condition
        self.k = 0
        self.needs_model = any(rule.needs_model for rule in rules)
        self.model_values: list[float] = []
        self.kept: dict[int, Tensor] = {}
        self.dropped = False
        self.vectors = MinresVectors(system)

    def begin(self, least: float) -> str | None:
        """The first Lanczos vector; a reason where there is nothing to do, or the square of ‖b‖ not above ``least``."""
        self.rhs_norm, self.residual_norm, squared = self.vectors.first_numbers().tolist()
        self.scalars = _Scalars(math.sqrt(max(squared, 0.0)) if self.system.preconditioned else self.residual_norm)
        if self.needs_model:
            self._append_model_value()
        if 0 in self.system.store:
            self.kept[0] = self.vectors.x(self.scalars)
        if least and not least < self.rhs_norm**2 < 1 / least:
            return _OUT_OF_RANGE
        if not all(map(math.isfinite, (self.rhs_norm, self.residual_norm, squared))):
            return "non_finite"
        if self.rhs_norm == 0:
            return "zero_rhs"
        if self.residual_norm <= self.tol * self.rhs_norm:
            return "converged"
        if squared <= 0:
            return "indefinite_preconditioner"
        self.vectors.begin(self.scalars.beta)
        return None

    def iterate(self) -> str | None:
        """One Lanczos step, the rotations and the update of the solution; why to stop, or None."""
        s, beta = self.scalars, self.scalars.beta
        numbers = self.vectors.step(beta).tolist()
        if not self._exact(numbers):
            numbers = [numbers[0], *self.vectors.wide_numbers().tolist()]
        if not all(map(math.isfinite, numbers)):
            return "non_finite"
        alpha, size, *inner = numbers
        if inner and size < -self.eps * max(s.norm, abs(alpha), beta) ** 2:
            return "indefinite_preconditioner"
        before = copy.copy(s)
        s.advance(alpha, math.sqrt(max(size, 0.0)) if inner else size)
        ended = s.beta <= self.eps * s.norm  # the Krylov space is exhausted
        residual_norm = self._residual_norm(inner, ended)
        reason = self._singular(residual_norm, ended)
        if reason is not None:
            s.u, self.residual_norm = (s.u[0], s.u[1], 0.0), s.residual_without_last
            if self.residual_norm > (1 + max(self.tol, self.eps**0.5)) * before.phi:
                # The last column is not negligible after all: the iterate before it is the better answer.
                self.scalars, self.residual_norm = before, before.phi
                if before.residual_without_last <= (1 + max(self.tol, self.eps**0.5)) * before.phi:  # but its own is
                    before.u, self.residual_norm = (before.u[0], before.u[1], 0.0), before.residual_without_last
                    self.dropped = True
                return reason
        self.k += 1
        self.vectors.take(s, ended)
        if reason is not None:
            self.dropped = True
            return reason
        self.residual_norm = residual_norm
        if self.needs_model:
            self._append_model_value()
        if self.k in self.system.store:
            self.kept[self.k] = self.x()
        progress = Progress(self.k, self.residual_norm, self.rhs_norm, self.model_values)
        for rule in self.rules:
            if bool(rule(progress)):
                return rule.name
        return "converged" if ended or self._at_resolution() else None

    def solution(self, reason: str) -> Solution:
        """What the solver returns."""
        system = self.system
        if reason == "zero_rhs":  # whatever the start
            x, r, residual_norm = torch.zeros_like(system.b), torch.zeros_like(system.b), system.b.new_zeros(())
        elif self.dropped or reason == "least_squares":  # the recurrence of the residual does not know of that
            x, r = self._shortened(self.x())
            residual_norm = torch.linalg.vector_norm(r)
        else:
            x, r, residual_norm = self.x(), self.vectors.residual(), system.b.new_tensor(self.residual_norm)
        kept = self.kept | ({self.k: x} if system.store else {})
        return Solution(
            x=system.unflatten(x),
            iterations=self.k,
            reason=reason,
            residual_norm=residual_norm,
            rhs_norm=system.b.new_tensor(self.rhs_norm),
            residual=system.unflatten(r),
            model_values=tuple(system.b.new_tensor(value) for value in self.model_values),
            iterates={i: system.unflatten(v) for i, v in kept.items()},
            matrix_norm=self.scalars.norm,
            condition=self.scalars.condition,
        )

    def _shortened(self, x: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """A least-squares solution without its part in the null space, and its residual: ``x − (rᵀx / rᵀr) r``.

        ``A b``, ``A² b``, … lie in the range of A, so that what of x lies in the null space is a multiple of b's part
        there; and to that the residual tends (Liu, Milzarek & Roosta 2023, arXiv:2309.17096). Where ``A r`` shows that
        the residual is something else, such as rounding, or where it would grow, x stays.
        """
        system = self.system
        r = system.b - system.product(x)
        z = system.precondition(r)
        start = 0.0 if system.x0 is None else system.x0
        Az = system.product(z)
        size, image = torch.dot(r, z).sqrt(), torch.dot(Az, system.precondition(Az)).sqrt()
        if not image <= 10 * max(self.tol, self.eps**0.5) * self.scalars.norm * size:
            return x, r
        share = torch.dot(r, x - start) / size.square()
        longer = r + share * Az
        grows = torch.linalg.vector_norm(longer) > 1.1 * torch.linalg.vector_norm(r)
        return (x, r) if grows else (x - share * z, longer)

    def x(self) -> Float[Tensor, " n"]:
        """The present iterate; it is only formed when somebody wants it."""
        return self.vectors.x(self.scalars)

    def _exact(self, numbers: list[float]) -> bool:
        """Whether no square in them is too small or too large for the precision."""
        _, size, *inner = numbers
        squares = (size, inner[0], inner[2]) if inner else (size * size,)
        return all(self.least < square < math.inf for square in squares)

    def _residual_norm(self, inner: list[float], ended: bool) -> float:
        s = self.scalars
        if not inner:
            return s.phi
        rr, ry, yy = inner
        factor = 0.0 if ended else -s.phi * s.c / s.beta
        return math.sqrt(max(s.s**4 * rr + 2 * s.s**2 * factor * ry + factor**2 * yy, 0.0))

    def _singular(self, residual_norm: float, ended: bool) -> str | None:
        """Whether the matrix is, as far as it is known, singular (or too ill-conditioned to go on)."""
        s = self.scalars
        if residual_norm <= self.tol * self.rhs_norm:
            return None
        if s.optimality <= max(self.tol, _NOISE * self.eps) * s.norm or s.last_is_noise(self.eps):
            return "least_squares"
        if ended and abs(s.gamma) <= 10 * self.eps * s.norm:
            return "least_squares"
        return "ill_conditioned" if s.condition >= self.max_condition else None

    def _at_resolution(self) -> bool:
        s = self.scalars
        return s.phi <= self.eps * (s.norm * s.length + s.first)

    def _append_model_value(self) -> None:
        x = self.x()
        self.model_values.append(-0.5 * float(torch.dot(x, self.vectors.residual() + self.system.b)))


class _Scalars:
    """The factors of T_k and the components of u_k; after ``advance`` number k, in the symbols of the paper.

    Args:
        beta: β₁, the norm of the first residual.
    """

    def __init__(self, beta: float) -> None:
        self.k = 0
        self.first = self.phi = self.beta = beta
        self.beta_before = 0.0
        self.c, self.s = -1.0, 0.0  # the last reflection from the left
        self.c1, self.s1 = -1.0, 0.0  # P_{k-1,k}
        self.c2, self.s2 = -1.0, 0.0  # P_{k-2,k}
        self.next_reflection = (-1.0, 0.0)  # P_{k-1,k+1}
        self.delta_next = self.epsilon_next = 0.0
        # L_k has γ on its diagonal, ϑ and η below it; of each, the last three rows
        self.gammas = self.thetas = self.etas = (0.0, 0.0, 0.0)
        self.taus = (0.0, 0.0, 0.0)  # the end of t_k
        self.u = (0.0, 0.0, 0.0)  # the end of u_k
        self.u_third = 0.0  # the component of u_k before them, which is final
        self.length_final = 0.0  # the norm of all components but the last two
        self.smallest_final = math.inf  # the least γ that no later reflection changes
        self.norm = 0.0  # of A, from below
        self.condition = 1.0
        self.optimality = self.best_optimality = math.inf  # ‖A r_{k-1}‖ / ‖r_{k-1}‖; the least before it

    @property
    def gamma(self) -> float:
        """The last diagonal element of L_k."""
        return self.gammas[2]

    @property
    def length(self) -> float:
        """‖x_k‖ (in the norm of the preconditioner)."""
        return math.hypot(self.length_final, self.u[1], self.u[2])

    def advance(self, alpha: float, beta_next: float) -> None:
        """Take in column k of T: β_k (known), α_k and β_{k+1}."""
        self.k += 1
        beta = self.beta if self.k > 1 else 0.0
        self.beta_before, self.beta = self.beta, beta_next
        # The left reflection of the step before acts on column k, then a new one removes β_{k+1}.
        delta = self.c * self.delta_next + self.s * alpha
        gamma = self.s * self.delta_next - self.c * alpha
        self.epsilon_next, self.delta_next = self.s * beta_next, -self.c * beta_next
        self.best_optimality = min(self.best_optimality, self.optimality)
        self.optimality = math.hypot(gamma, self.delta_next)
        self.c, self.s, gamma = _reflection(gamma, beta_next)
        self.taus = (*self.taus[1:], self.c * self.phi)
        self.phi = self.s * self.phi
        # P_{k-2,k}, known from the step before, and a new P_{k-1,k} act from the right.
        self.c2, self.s2 = self.next_reflection
        theta = self.thetas[2]
        theta, delta = self.c2 * theta + self.s2 * delta, self.s2 * theta - self.c2 * delta
        self.etas = (*self.etas[1:], self.s2 * gamma)
        gamma, gamma_before, theta_last = -self.c2 * gamma, self.gammas[2], 0.0
        if self.k > 1:
            self.c1, self.s1, gamma_before = _reflection(gamma_before, delta)
            theta_last, gamma = self.s1 * gamma, -self.c1 * gamma
        self.thetas = (self.thetas[1], theta, theta_last)
        self.gammas = (self.gammas[1], gamma_before, gamma)
        self._solve()
        self._estimate(math.hypot(beta, alpha, beta_next))
        if self.k > 1:
            c, s, gamma_before = _reflection(gamma_before, self.epsilon_next)
            self.next_reflection = (c, s)
        self.gammas = (self.gammas[0], gamma_before, gamma)

    @property
    def residual_without_last(self) -> float:
        """‖r‖ where the last component of u_k is left out."""
        return math.hypot(self.taus[2] - self.etas[2] * self.u[0] - self.thetas[2] * self.u[1], self.phi)

    def last_is_noise(self, eps: float) -> bool:
        """Whether the last component of u_k lengthens x without reducing the residual.

        That is, as close to a least-squares solution as rounding lets it come: ``‖A r‖ / ‖A‖ ‖r‖`` is at √eps, or grows
        again from about there.
        """
        gain = self.residual_without_last / self.phi - 1 if self.phi else math.inf
        turned = self.best_optimality <= eps**0.375 * self.norm and self.optimality > self.best_optimality
        # where γ and β are both rounding, so is their ratio, and with it a little of what φ seems to have lost
        return (gain <= eps**0.5 and turned) or (gain <= eps**0.25 and self.optimality <= eps**0.5 * self.norm)

    def _solve(self) -> None:
        """The last three components of u_k from ``L_k u_k = t_k``."""
        u = [self.u_third, self.u[0]]  # components k - 4 and k - 3
        for eta, theta, gamma, tau in zip(self.etas, self.thetas, self.gammas, self.taus, strict=True):
            u.append((tau - eta * u[-2] - theta * u[-1]) / gamma if gamma else 0.0)
        self.u_third, self.u = u[1], (u[2], u[3], u[4])
        self.length_final = math.hypot(self.length_final, u[2])

    def _estimate(self, column: float) -> None:
        """Of ‖A‖ and of the condition number, from below."""
        final, before, last = map(abs, self.gammas)
        if self.k > 2:
            self.smallest_final = min(self.smallest_final, final)
        smallest = min(self.smallest_final, last, before if self.k > 1 else math.inf)
        self.norm = max(self.norm, column, before, last)
        self.condition = self.norm / smallest if smallest else math.inf


def _reflection(a: float, b: float) -> tuple[float, float, float]:
    """c, s and r ≥ 0 with ``[[c, s], [s, −c]] (a, b)ᵀ = (r, 0)ᵀ``; for a = b = 0 the exchange of both."""
    r = math.hypot(a, b)
    return (a / r, b / r, r) if r else (0.0, 1.0, 0.0)
