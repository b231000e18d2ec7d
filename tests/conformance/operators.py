"""What every linear operator must do. Subclass `OperatorContract` in a test file and supply `operator` and `dense`."""

import numpy as np
import pytest
import torch
from torch import Tensor

from natgrad.operators.base import LinearOperator


class OperatorContract:
    """Inherit, override the two fixtures, and every test below runs on your operator."""

    @pytest.fixture
    def operator(self) -> LinearOperator:
        raise NotImplementedError("override the fixture `operator`")

    @pytest.fixture
    def dense(self) -> Tensor:
        raise NotImplementedError("override the fixture `dense`")

    def test_dense(self, operator: LinearOperator, dense: Tensor) -> None:
        assert operator.shape == dense.shape
        assert operator.dtype == dense.dtype
        torch.testing.assert_close(operator.to_dense(), dense)

    def test_vector_and_columns(self, operator: LinearOperator, dense: Tensor) -> None:
        v = _random(dense.shape[1], 3)
        torch.testing.assert_close(operator @ v[:, 0], dense @ v[:, 0])
        torch.testing.assert_close(operator @ v, dense @ v)
        torch.testing.assert_close(operator @ v, torch.stack([operator @ column for column in v.T], 1))
        assert (operator @ v[:, :1]).shape == (dense.shape[0], 1)

    def test_transpose(self, operator: LinearOperator, dense: Tensor) -> None:
        u = _random(dense.shape[0], 3)
        torch.testing.assert_close(operator.T @ u, dense.T @ u)
        torch.testing.assert_close(operator.T @ u[:, 0], dense.T @ u[:, 0])
        torch.testing.assert_close(operator.T.to_dense(), dense.T)
        assert operator.T.shape == dense.T.shape
        torch.testing.assert_close(operator.T.T @ _random(dense.shape[1], 1), dense @ _random(dense.shape[1], 1))

    def test_quadratic_form(self, operator: LinearOperator, dense: Tensor) -> None:
        u, v = _random(dense.shape[0], 2, seed=1), _random(dense.shape[1], 3)
        torch.testing.assert_close(operator.quadratic_form(u[:, 0], v[:, 0]), u[:, 0] @ dense @ v[:, 0])
        torch.testing.assert_close(operator.quadratic_form(u, v), u.T @ dense @ v)
        torch.testing.assert_close(operator.quadratic_form(u, v[:, 0]), u.T @ dense @ v[:, 0])
        torch.testing.assert_close(operator.quadratic_form(u[:, 0], v), u[:, 0] @ dense @ v)
        if dense.shape[0] == dense.shape[1]:
            torch.testing.assert_close(operator.quadratic_form(u[:, 0]), u[:, 0] @ dense @ u[:, 0])

    def test_dict(self, operator: LinearOperator, dense: Tensor) -> None:
        if operator.domain is None:
            with pytest.raises(TypeError, match="dict"):
                operator @ {"weight": torch.zeros(1)}
            return
        v = _random(dense.shape[1], 2)
        out = operator @ operator.domain.to_dict(v)
        flat = out if operator.codomain is None else operator.codomain.to_vector(out)
        torch.testing.assert_close(flat, dense @ v)
        one = operator @ operator.domain.to_dict(v[:, 0])
        flat = one if operator.codomain is None else operator.codomain.to_vector(one)
        torch.testing.assert_close(flat, dense @ v[:, 0])
        if operator.codomain is not None:
            form = operator.quadratic_form(operator.codomain.to_dict(v[:, 1]), operator.domain.to_dict(v[:, 0]))
            torch.testing.assert_close(form, v[:, 1] @ dense @ v[:, 0])

    def test_scipy(self, operator: LinearOperator, dense: Tensor) -> None:
        scipy_operator = operator.to_scipy()
        v, u = _random(dense.shape[1], 2).numpy(), _random(dense.shape[0], 2).numpy()
        np.testing.assert_allclose(scipy_operator @ v, dense.numpy() @ v, atol=1e-10)
        np.testing.assert_allclose(scipy_operator @ v[:, 0], dense.numpy() @ v[:, 0], atol=1e-10)
        np.testing.assert_allclose(scipy_operator.T @ u, dense.numpy().T @ u, atol=1e-10)
        assert scipy_operator.dtype == np.float64

    def test_bad_vectors(self, operator: LinearOperator) -> None:
        n = operator.shape[1]
        with pytest.raises(ValueError, match=rf"\[{n}\]"):
            operator @ _random(n + 1, 1)
        with pytest.raises(ValueError, match="float32"):
            operator @ _random(n, 1).float()
        with pytest.raises(ValueError, match="order"):
            operator.to_dense(order="rows")
        with pytest.raises(TypeError):
            operator @ 3.0

    def test_products_do_not_write(self, operator: LinearOperator, dense: Tensor) -> None:
        v = _random(dense.shape[1], 2)
        before = v.clone()
        first = operator @ v
        assert torch.equal(v, before)
        first += 1  # a result is the caller's own
        torch.testing.assert_close(operator @ v, dense @ v)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
