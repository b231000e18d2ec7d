"""What the Krylov solvers share: solutions that say why they stopped, stopping rules, and vectors in any form.

A solver works on one flat tensor. A right-hand side may be a tensor of any shape (one vector with the inner product of
its entries) or a dict of tensors; the matrix sees vectors in the same form, and the solution comes back in it.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Tensor | Mapping[str, Tensor]
Scalar = Float[Tensor, ""] | float


@dataclass(frozen=True)
class Solution:
    """What a solver returns; a failure is a value that says what happened, not an exception.

    Args:
        x: the solution, in the form of b.
        iterations: products with the matrix that the solution rests on.
        reason: why the solver stopped: ``"converged"`` (‖r‖ ≤ tol ‖b‖), ``"relative_progress"`` or another rule's
            ``name``, ``"max_iters"``, ``"zero_rhs"`` (x = 0), ``"non_finite"`` (b, a product, the preconditioner; x is
            the last finite iterate), ``"indefinite_preconditioner"``; from :func:`cg` also ``"negative_curvature"``;
            from :func:`minres_qlp` also ``"least_squares"`` (‖A r‖ ≤ tol ‖A‖ ‖r‖: no x does better) and
            ``"ill_conditioned"``.
        residual_norm: ‖b − A x‖ as the solver's recurrence has it; a 0-d tensor.
        rhs_norm: ‖b‖.
        residual: b − A x, in the form of b; ``xᵀA x = xᵀ(b − residual)`` costs no product.
        model_values: ``½ xᵀA x − bᵀx`` after 0, 1, … iterations, from :func:`cg`.
        direction: where ``pᵀA p ≤ 0`` ended :func:`cg`: that direction p, in the form of b.
        curvature: ``pᵀA p / pᵀp`` of that direction; a 0-d tensor.
        iterates: the solutions after the iterations that were asked for, and the last one.
        matrix_norm: an estimate (from below) of ‖A‖, from :func:`minres_qlp`.
        condition: an estimate (from below) of the condition number, from :func:`minres_qlp`.
    """

    x: Any
    iterations: int
    reason: str
    residual_norm: Float[Tensor, ""]
    rhs_norm: Float[Tensor, ""]
    residual: Any
    model_values: tuple[Float[Tensor, ""], ...] = ()
    direction: Any = None
    curvature: Float[Tensor, ""] | None = None
    iterates: dict[int, Any] = field(default_factory=dict)
    matrix_norm: float | None = None
    condition: float | None = None

    @property
    def converged(self) -> bool:
        """Whether a rule that asks for a good enough x stopped the solver."""
        return self.reason not in (
            "max_iters",
            "non_finite",
            "negative_curvature",
            "indefinite_preconditioner",
            "ill_conditioned",
        )

    @property
    def relative_residual(self) -> Float[Tensor, ""]:
        """‖b − A x‖ / ‖b‖; 0 for b = 0."""
        return torch.where(self.rhs_norm > 0, self.residual_norm / self.rhs_norm, torch.zeros_like(self.rhs_norm))


@dataclass(frozen=True)
class Progress:
    """What a stopping rule sees after an iteration.

    Args:
        iteration: how many there have been.
        residual_norm: ‖b − A x‖.
        rhs_norm: ‖b‖.
        model_values: ``½ xᵀA x − bᵀx`` after 0, 1, … iterations; only for rules with ``needs_model``.
    """

    iteration: int
    residual_norm: Scalar
    rhs_norm: Scalar
    model_values: Sequence[Scalar] = ()


class StoppingRule(Protocol):
    """Says when to stop: a tensor (no wait for the device) or a bool; numbers come as 0-d tensors or as floats."""

    @property
    def name(self) -> str:
        """The reason that the solution then gives."""
        ...

    @property
    def needs_model(self) -> bool:
        """Whether ``progress.model_values`` is read."""
        ...

    def __call__(self, progress: Progress) -> Tensor | bool:
        """Whether to stop."""
        ...


@dataclass(frozen=True)
class RelativeResidual:
    """Stop when ``‖b − A x‖ ≤ tol ‖b‖``.

    Args:
        tol: relative to ‖b‖.
    """

    tol: float = 1e-4
    name: str = field(default="converged", init=False)
    needs_model: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.tol >= 0:
            raise ValueError(f"tol={self.tol}: expected a non-negative number, relative to ‖b‖, such as 1e-4")

    def __call__(self, progress: Progress) -> Tensor | bool:
        """Whether the residual is small enough."""
        return progress.residual_norm <= self.tol * progress.rhs_norm


@dataclass(frozen=True)
class RelativeProgress:
    """Stop when the quadratic model φ = ½ xᵀA x − bᵀx hardly falls any more (Martens 2010, sec. 4.4).

    With ``k = max(minimum, fraction · i)`` after iteration i: stop when ``i > k``, ``φ(x_i) < 0`` and
    ``(φ(x_i) − φ(x_{i−k})) / φ(x_i) < k ε``.

    Args:
        epsilon: ε, progress per iteration.
        minimum: the fewest iterations that progress is measured over.
        fraction: progress is measured over this part of all iterations at least.
    """

    epsilon: float = 5e-4
    minimum: int = 10
    fraction: float = 0.1
    name: str = field(default="relative_progress", init=False)
    needs_model: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or self.minimum < 1 or not 0 <= self.fraction <= 1:
            raise ValueError(
                f"{self}: expected epsilon > 0, minimum ≥ 1 and a fraction between 0 and 1; "
                "RelativeProgress() is the published rule"
            )

    def __call__(self, progress: Progress) -> Tensor | bool:
        """Whether the last k iterations brought too little."""
        i = progress.iteration
        k = max(self.minimum, int(self.fraction * i))
        if i <= k:
            return False
        now, before = progress.model_values[i], progress.model_values[i - k]
        return (now < 0) & (now - before > k * self.epsilon * now)


def geometric_indices(max_iters: int, factor: float = 1.3) -> tuple[int, ...]:
    """The iterations whose iterates Martens (2010, sec. 4.6) stores: ``⌈factor^j⌉`` for j = 0, 1 and so on.

    Args:
        max_iters: the last index that may occur.
        factor: of two neighbours.

    Raises:
        ValueError: the factor is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"factor={factor}: expected a number above 1, such as 1.3")
    indices, power = [], 1.0
    while power <= max_iters:
        indices.append(int(-(-power // 1)))
        power *= factor
    return tuple(dict.fromkeys(i for i in indices if i <= max_iters))


class System:
    """``A x = b`` on flat tensors: checks what arrives, and converts forms.

    Every vector is detached where it comes in, so that nothing of the solve is recorded for differentiation. Vectors of
    half precision are kept in single precision; the matrix and the preconditioner see those of b's, as do callers.

    Args:
        matrix: a callable on vectors in the form of b, or anything with ``@``.
        b: the right-hand side.
        max_iters: checked here for both solvers.
        preconditioner: like ``matrix``; applies an approximation of A^{-1}, symmetric and positive definite.
        x0: where to start.
        store: the iterations whose iterates are kept.

    Raises:
        TypeError: something is neither a callable nor an operator, or b is no real floating-point vector.
        ValueError: ``max_iters`` is negative, or x0 does not fit b.
    """

    def __init__(
        self, matrix: Any, b: Vector, max_iters: int, preconditioner: Any, x0: Vector | None, store: Iterable[int]
    ) -> None:
        if isinstance(max_iters, bool) or not isinstance(max_iters, int) or max_iters < 0:
            raise ValueError(f"max_iters={max_iters!r}: expected an integer of at least 0")
        self.max_iters = max_iters
        self.form = _form(b)
        self.b = self._flat(b, "b").detach()
        if not self.b.is_floating_point():
            raise TypeError(f"b: expected real floating-point numbers, got {self.b.dtype}; use b.float()")
        self._dtype = self.b.dtype
        self.b = self.b.to(torch.promote_types(self._dtype, torch.float32))
        self.x0 = None if x0 is None else self._flat(x0, "x0").detach().to(self.b)
        self.store = frozenset(store)
        for name, operator in (("matvec", matrix), ("preconditioner", preconditioner)):
            if isinstance(operator, Tensor) and operator.ndim == 2:
                self._check_matrix(name, operator)
        self._matrix = _product("matvec", matrix)
        self._preconditioner = None if preconditioner is None else _product("preconditioner", preconditioner)

    @property
    def preconditioned(self) -> bool:
        """Whether there is a preconditioner."""
        return self._preconditioner is not None

    def with_start(self, b: Float[Tensor, " n"], x0: Float[Tensor, " n"] | None) -> "System":
        """The same matrix with another right-hand side and another start."""
        other = copy.copy(self)
        other.b, other.x0 = b, x0
        return other

    def product(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """``A v``; may share memory with v, so nobody writes into it."""
        return self._apply(self._matrix, v, "matvec(v)")

    def precondition(self, r: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The preconditioner times r; r itself without one."""
        return r if self._preconditioner is None else self._apply(self._preconditioner, r, "preconditioner(r)")

    def unflatten(self, v: Float[Tensor, " n"]) -> Any:
        """A flat vector in the form and precision of b."""
        v = v.to(self._dtype)
        if isinstance(self.form, torch.Size):
            return v.reshape(self.form)
        sizes = [shape.numel() for shape in self.form.values()]
        return {key: part.reshape(shape) for (key, shape), part in zip(self.form.items(), v.split(sizes), strict=True)}

    def _apply(self, function: Callable[[Any], Any], v: Tensor, name: str) -> Tensor:
        return self._flat(function(self.unflatten(v)), name).detach().to(self.b.dtype)

    def _check_matrix(self, name: str, matrix: Tensor) -> None:
        if not isinstance(self.form, torch.Size) or not self.form:
            raise ValueError(f"{name}: a matrix multiplies vectors; b is {_described(self.form)}: pass a function")
        rows = self.form[max(len(self.form) - 2, 0)]
        if matrix.shape != (rows, rows) or matrix.dtype != self._dtype:
            raise ValueError(
                f"{name}: expected a matrix of shape {[rows, rows]} and dtype {self._dtype}, for b has "
                f"{_described(self.form)}; got {list(matrix.shape)}, {matrix.dtype}"
            )

    def _flat(self, v: Any, name: str) -> Tensor:
        form = _form(v, name)
        if form != self.form:
            raise ValueError(f"{name}: expected the form of b, {_described(self.form)}; got {_described(form)}")
        if isinstance(v, Tensor):
            return v.reshape(-1)
        return torch.cat([v[key].reshape(-1) for key in self.form])


def _form(v: Any, name: str = "b") -> torch.Size | dict[str, torch.Size]:
    if isinstance(v, Tensor):
        return v.shape
    if isinstance(v, Mapping) and v and all(isinstance(part, Tensor) for part in v.values()):
        return {key: part.shape for key, part in v.items()}
    raise TypeError(f"{name}: expected a tensor or a dict of tensors, got {type(v).__name__}")


def _described(form: torch.Size | dict[str, torch.Size]) -> str:
    if isinstance(form, torch.Size):
        return f"shape {list(form)}"
    return "{" + ", ".join(f"{key!r}: {list(shape)}" for key, shape in form.items()) + "}"


def _product(name: str, operator: Any) -> Callable[[Any], Any]:
    if hasattr(operator, "__matmul__"):
        return lambda v: operator @ v
    if callable(operator):
        return operator
    raise TypeError(f"{name}: expected a callable or an operator with @, got {type(operator).__name__}")


def all_rules(tol: float, stop: StoppingRule | Sequence[StoppingRule]) -> tuple[StoppingRule, ...]:
    """The rule of ``tol`` and those asked for beside it.

    Raises:
        TypeError: one is no rule.
    """
    others = stop if isinstance(stop, Sequence) else (stop,)
    for rule in others:
        if not (callable(rule) and hasattr(rule, "name") and hasattr(rule, "needs_model")):
            raise TypeError(
                f"stop={rule!r}: expected a rule such as natgrad.linalg.RelativeProgress(), called with the progress, "
                "with a name and needs_model; or a sequence of such"
            )
    return (RelativeResidual(tol), *others)
