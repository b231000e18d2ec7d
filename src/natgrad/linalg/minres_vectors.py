"""The long vectors of MINRES-QLP: Lanczos vectors, and the solution and the residual as combinations of them.

An iteration makes the three-term step of Lanczos; the combinations are formed every few iterations, or where they are
asked for. Their coefficients come from :mod:`natgrad.linalg.minres_qlp`, whose symbols are used here.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.deferred import DeferredVectors
from natgrad.linalg.krylov import System

# Lanczos vectors that are kept at most: more take memory and save little.
_WINDOW = 6
# The combinations: columns k - 1 and k of W_k, the sum of u_i times the columns before them, and the residual.
_BEFORE, _LAST, _FINAL, _RESIDUAL = range(4)


class Factors(Protocol):
    """What the combinations take from the factors of T_k and from u_k."""

    k: int
    beta: float  # β_{k+1}
    phi: float
    c: float
    s: float
    c1: float
    s1: float
    c2: float
    s2: float
    u: tuple[float, float, float]


class MinresVectors:
    """The vectors of one solve.

    With a preconditioner M there are Lanczos vectors v_k, of which the solution consists, and ``y_k = M v_k``, of which
    the residual consists. Without one they are the same, and the residual is one more combination.

    Args:
        system: what is solved.
    """

    def __init__(self, system: System) -> None:
        b = system.b
        self._system, self._start = system, system.x0
        carried = _RESIDUAL if system.preconditioned else _RESIDUAL + 1
        self._basis = DeferredVectors(b, carried, min(_WINDOW, max(system.max_iters, 2) + 1))
        y = torch.empty_like(b) if system.preconditioned else self._basis.place()
        # y_{k+1} and M^{-1} y_{k+1} as they come, not yet divided by β_{k+1}
        self._new = y.copy_(b) if self._start is None else torch.sub(b, system.product(self._start), out=y)
        self._new_z = system.precondition(self._new)
        self._r = self._new.clone() if system.preconditioned else None
        # y_{k-1} and y_k, where they are vectors of their own
        self._ys = (b, torch.zeros_like(b)) if system.preconditioned else None

    def first_numbers(self) -> Float[Tensor, "3"]:
        """``‖b‖``, ``‖r‖`` and ``rᵀM^{-1} r`` of the start."""
        norm = torch.linalg.vector_norm
        return torch.stack((norm(self._system.b), norm(self._new), torch.dot(self._new, self._new_z)))

    def begin(self, beta: float) -> None:
        """The first Lanczos vector, β₁ being its norm."""
        column = self._append(beta)
        if self._r is None:
            self._basis.coefficients[_RESIDUAL, column] = beta

    def step(self, beta: float) -> Float[Tensor, " numbers"]:
        """The three-term step.

        Args:
            beta: β_k.

        Returns:
            α_k and ``‖y‖``; with a preconditioner α_k, ``yᵀM^{-1} y``, ``rᵀr``, ``rᵀy`` and ``yᵀy``.
        """
        place = self._basis.place()  # first, for it may move vectors
        v = self._basis.newest(1)
        before, last = (self._basis.newest(2), v) if self._ys is None else self._ys
        product = self._system.product(v)
        # never in the memory of the product: it may be v
        y = torch.sub(product, before, alpha=beta, out=place if self._ys is None else before)
        alpha = torch.dot(y, v)
        y.addcmul_(last, alpha, value=-1)
        z = self._system.precondition(y)
        self._new, self._new_z = y, z
        if self._r is None:
            return torch.stack((alpha, torch.linalg.vector_norm(y)))
        r = self._r
        return torch.stack((alpha, torch.dot(y, z), torch.dot(r, r), torch.dot(r, y), torch.dot(y, y)))

    def wide_numbers(self) -> Float[Tensor, " numbers"]:
        """What the last :meth:`step` returned but for α_k, in double precision where the device has it."""
        real = torch.float64 if self._new.device.type != "mps" else torch.float32
        y = self._new.to(real)
        if self._r is None:
            return torch.linalg.vector_norm(y)[None]
        z, r = self._new_z.to(real), self._r.to(real)
        return torch.stack((torch.dot(y, z), torch.dot(r, r), torch.dot(r, y), torch.dot(y, y)))

    def take(self, factors: Factors, ended: bool) -> None:
        """``W_k = V_k P_k``: the last three columns change, the third last is final and enters x; and the residual.

        Args:
            factors: those of step k.
            ended: there is no v_{k+1}.
        """
        f, rows, v = factors, self._basis.coefficients, self._basis.used - 1
        third = f.s2 * rows[_BEFORE]
        third[v] -= f.c2
        rows[_FINAL] += f.c2 * f.u[0] * rows[_BEFORE]
        rows[_FINAL, v] += f.s2 * f.u[0]
        before, last = f.c1 * rows[_LAST] + f.s1 * third, f.s1 * rows[_LAST] - f.c1 * third
        rows[_BEFORE], rows[_LAST] = before, last
        if self._r is None:
            rows[_RESIDUAL] *= f.s**2
        else:
            self._r.mul_(f.s**2)
        if ended:
            return
        column = self._append(f.beta)
        if self._r is None:
            rows[_RESIDUAL, column] = -f.phi * f.c
        else:
            self._r.add_(self._new, alpha=-f.phi * f.c)

    def x(self, factors: Factors) -> Float[Tensor, " n"]:
        """The present iterate."""
        if not factors.k:
            return torch.zeros_like(self._system.b) if self._start is None else self._start.clone()
        rows = self._basis.coefficients
        x = self._basis.form(rows[_FINAL] + factors.u[1] * rows[_BEFORE] + factors.u[2] * rows[_LAST])
        return x if self._start is None else x.add_(self._start)

    def residual(self) -> Float[Tensor, " n"]:
        """``b − A x`` as the recurrence has it."""
        if self._r is not None:
            return self._r
        if self._basis.used == self._basis.carried:  # nothing has begun
            return self._new.clone()
        return self._basis.form(self._basis.coefficients[_RESIDUAL])

    def _append(self, beta: float) -> int:
        """The new Lanczos vectors, divided by their norm; the row of v."""
        if self._ys is not None:
            torch.div(self._new_z, beta, out=self._basis.place())  # first: M^{-1} y may be y
            self._ys = (self._ys[1], self._new)
        self._new.div_(beta)
        return self._basis.append()
