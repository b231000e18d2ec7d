"""The one contract of a linear operator: ``@``, ``.T``, ``to_dense``, ``quadratic_form``, ``to_scipy``.

A subclass supplies the product with the columns of a matrix, `LinearOperator._matmat`, and, unless it is symmetric,
that of its transpose. Operators are values: a product never changes the operator, the model or any global state.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.model_view import ModelView

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

Order = Literal["parameters", "vec"]


class LinearOperator:
    """A real matrix given by its products.

    Args:
        shape: rows, columns.
        dtype: of the vectors it takes and returns.
        device: where those live.
        domain: the parameters, where the operator acts on vectors over them; it then takes dicts as well.
        codomain: the parameters, where its results are vectors over them.
        symmetric: whether it is its own transpose.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        domain: ModelView | None = None,
        codomain: ModelView | None = None,
        symmetric: bool = False,
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.domain = domain
        self.codomain = codomain
        self.symmetric = symmetric

    def _matmat(self, v: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """The product with every column of v."""
        raise NotImplementedError(f"{type(self).__name__} must implement _matmat")

    def _rmatmat(self, u: Float[Tensor, "rows k"]) -> Float[Tensor, "columns k"]:
        """The transpose's product with every column of u."""
        if self.symmetric:
            return self._matmat(u)
        raise NotImplementedError(f"{type(self).__name__} must implement _rmatmat")

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector ``[n]``, a matrix ``[n, k]``, or a dict over the parameters.

        Returns:
            a tensor, or a dict where a dict came in and the result is a vector over the parameters.

        Raises:
            TypeError: v is neither a tensor nor a dict over the parameters.
            ValueError: v has another length, dtype or device.
        """
        if isinstance(v, Mapping):
            product = self @ self._flattened(v)
            return product if self.codomain is None else self.codomain.to_dict(product)
        if not isinstance(v, Tensor):
            return NotImplemented
        self._check(v)
        return self._matmat(v[:, None])[:, 0] if v.ndim == 1 else self._matmat(v)

    @property
    def T(self) -> "LinearOperator":
        """The transpose; a symmetric operator is its own."""
        return self if self.symmetric else _Transposed(self)

    def to_dense(self, order: Order = "parameters") -> Float[Tensor, "rows columns"]:
        """The matrix itself.

        Args:
            order: of the parameters: "parameters" as in ``parameters_to_vector``; "vec" stacks per linear layer the
                columns of ``[W b]`` [KFAC, sec. 2], the other parameters after them.

        Raises:
            ValueError: unknown order, or "vec" for an operator that does not act on parameters.
        """
        if order not in ("parameters", "vec"):
            raise ValueError(f'order: expected "parameters" or "vec", got {order!r}')
        dense = self._dense()
        if order == "parameters":
            return dense
        if self.domain is None and self.codomain is None:
            raise ValueError('order: "vec" orders parameters, but this operator does not act on any; use "parameters"')
        if self.codomain is not None:
            dense = dense[vec_order(self.codomain)]
        if self.domain is not None:
            dense = dense[:, vec_order(self.domain)]
        return dense

    def _dense(self) -> Float[Tensor, "rows columns"]:
        rows, columns = self.shape
        if rows < columns and not self.symmetric:
            return self._rmatmat(torch.eye(rows, dtype=self.dtype, device=self.device)).T
        return self._matmat(torch.eye(columns, dtype=self.dtype, device=self.device))

    def quadratic_form(self, u: Any, v: Any = None) -> Tensor:
        """The bilinear form ``uᵀ op v``, without v ``uᵀ op u``: 0-d for vectors, ``[j, k]`` for matrices of columns.

        u and v may be dicts over the parameters.

        Raises:
            ValueError: u or v has another length, dtype or device.
        """
        if isinstance(u, Mapping):
            u = self.T._flattened(u)
        if isinstance(v, Mapping):
            v = self._flattened(v)
        self.T._check(u)
        left = u if u.ndim == 2 else u[:, None]
        if v is None or v is u:  # one object, so that a subclass can see that both sides are the same
            self._check(u)
            v, right = u, left
        else:
            self._check(v)
            right = v if v.ndim == 2 else v[:, None]
        form = self._form(left, right)
        if v.ndim == 1:
            form = form[:, 0]
        return form[0] if u.ndim == 1 else form

    def _form(self, u: Float[Tensor, "rows j"], v: Float[Tensor, "columns k"]) -> Float[Tensor, "j k"]:
        return u.T @ self._matmat(v)

    def to_scipy(self) -> "ScipyOperator":
        """The same operator as a ``scipy.sparse.linalg.LinearOperator``, for NumPy arrays.

        Raises:
            ImportError: SciPy is not installed.
        """
        try:
            from scipy.sparse import linalg
        except ImportError as error:
            raise ImportError("to_scipy() needs SciPy, which natgrad does not require: pip install scipy") from error

        def forward(v: Any) -> Any:
            return (self @ torch.as_tensor(v, dtype=self.dtype).to(self.device)).detach().cpu().numpy()

        def backward(u: Any) -> Any:
            return (self.T @ torch.as_tensor(u, dtype=self.dtype).to(self.device)).detach().cpu().numpy()

        return linalg.LinearOperator(
            shape=tuple(self.shape),
            matvec=lambda v: forward(v.reshape(-1)),
            rmatvec=lambda u: backward(u.reshape(-1)),
            matmat=forward,
            rmatmat=backward,
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def __repr__(self) -> str:
        """Name, shape, dtype and device."""
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def _flattened(self, v: Mapping[str, Tensor]) -> Tensor:
        if self.domain is None:
            raise TypeError(f"{type(self).__name__} does not act on parameters: expected a tensor, got a dict")
        return self.domain.to_vector(v)

    def _check(self, v: Tensor) -> None:
        name, n = type(self).__name__, self.shape[1]
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"{name} @ v: expected v of shape [{n}] or [{n}, k], got {list(v.shape)}")
        if v.dtype != self.dtype:
            raise ValueError(f"{name} @ v: expected v of dtype {self.dtype}, got {v.dtype}; convert it with .to()")
        if v.device.type != self.device.type:
            raise ValueError(f"{name} @ v: expected v on {self.device}, got it on {v.device}; move it with .to()")


class _Transposed(LinearOperator):
    """The transpose of an operator, by exchanging its two products."""

    def __init__(self, operator: LinearOperator) -> None:
        rows, columns = operator.shape
        super().__init__(
            (columns, rows),
            dtype=operator.dtype,
            device=operator.device,
            domain=operator.codomain,
            codomain=operator.domain,
        )
        self.operator = operator

    def _matmat(self, v: Tensor) -> Tensor:
        return self.operator._rmatmat(v)

    def _rmatmat(self, u: Tensor) -> Tensor:
        return self.operator._matmat(u)

    @property
    def T(self) -> LinearOperator:
        """The operator that was transposed."""
        return self.operator


def vec_order(view: ModelView) -> Tensor:
    """Where the entries of the "vec" order stand in the order of the parameters: ``dense[order][:, order]``.

    Per ``nn.Linear``, in the order of the modules, the columns of ``[W b]`` stacked, the bias being the last column;
    after all layers the parameters that belong to none, each row-major.

    Returns:
        int64 ``[P]``.
    """
    index = view.to_dict(torch.arange(view.num_parameters, device=view.device))
    position = {id(parameter): index[name] for name, parameter in view.parameters.items()}
    parts: list[Tensor] = []
    for module in view.module.modules():
        if isinstance(module, nn.Linear):
            weight = position.pop(id(module.weight), None)
            bias = None if module.bias is None else position.pop(id(module.bias), None)
            parts += [] if weight is None else [weight.T.reshape(-1)]
            parts += [] if bias is None else [bias]
    return torch.cat([*parts, *(rest.reshape(-1) for rest in position.values())])
