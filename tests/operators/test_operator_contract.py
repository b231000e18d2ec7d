"""Every exact operator keeps the contract, each against its dense twin."""

import pytest
import torch
from conformance.operators import OperatorContract
from oracles import dense as oracle
from oracles import networks
from torch import Tensor

import natgrad.likelihoods as lik
from natgrad.operators import autodiff, base

CASE, LIK = "mlp", lik.Categorical()


def _case() -> tuple[networks.Case, Tensor]:
    case = networks.case(CASE)
    return case, networks.targets("categorical", case.z)


class TestJacobian(OperatorContract):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, _ = _case()
        return autodiff.Jacobian(case.model, case.x)

    @pytest.fixture
    def dense(self) -> Tensor:
        case, _ = _case()
        return oracle.jacobian(case.model, case.x)


class TestJacobianInPasses(TestJacobian):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, _ = _case()
        return autodiff.Jacobian(case.model, case.x, chunk_size=2)


class TestFisher(OperatorContract):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, _ = _case()
        return autodiff.Fisher(case.model, LIK, case.x)

    @pytest.fixture
    def dense(self) -> Tensor:
        case, _ = _case()
        return oracle.fisher_by_enumeration(case.model, case.x, "categorical") / 4


class TestFisherInPasses(TestFisher):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, _ = _case()
        return autodiff.Fisher(case.model, LIK, case.x, chunk_size=2)


class TestFisherInProbabilities(TestFisher):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, _ = _case()
        return autodiff.Fisher(case.model, LIK, case.x, parametrization="probabilities")


class TestGaussNewton(TestFisher):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, y = _case()
        return autodiff.GaussNewton(case.model, LIK, case.x, y)


class TestGaussNewtonInProbabilities(OperatorContract):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, y = _case()
        return autodiff.GaussNewton(case.model, LIK, case.x, y, linearize="probabilities")

    @pytest.fixture
    def dense(self) -> Tensor:
        case, y = _case()
        return oracle.gauss_newton_in_probabilities(case.model, case.x, y, "categorical") / 4


class TestHessian(OperatorContract):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, y = _case()
        return autodiff.Hessian(case.model, LIK, case.x, y, chunk_size=7)

    @pytest.fixture
    def dense(self) -> Tensor:
        case, y = _case()
        return oracle.hessian(case.model, lambda: oracle.nll("categorical")(case.model(case.x), y) / 4)


class TestEmpiricalFisher(OperatorContract):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, y = _case()
        return autodiff.EmpiricalFisher(case.model, LIK, case.x, y)

    @pytest.fixture
    def dense(self) -> Tensor:
        case, y = _case()
        g = oracle.per_example_gradients(case.model, case.x, y, oracle.nll("categorical"))
        return g.T @ g / 4


class TestGradientCovariance(OperatorContract):
    @pytest.fixture
    def operator(self) -> base.LinearOperator:
        case, y = _case()
        return autodiff.GradientCovariance(case.model, LIK, case.x, y)

    @pytest.fixture
    def dense(self) -> Tensor:
        case, y = _case()
        g = oracle.per_example_gradients(case.model, case.x, y, oracle.nll("categorical"))
        return torch.cov(g.T, correction=0)


class TestPlainMatrix(OperatorContract):
    """An operator of a user's own, rectangular and on no parameters."""

    class Matrix(base.LinearOperator):
        def __init__(self, matrix: Tensor) -> None:
            super().__init__(tuple(matrix.shape), dtype=matrix.dtype, device=matrix.device)
            self.matrix = matrix

        def _matmat(self, v: Tensor) -> Tensor:
            return self.matrix @ v

        def _rmatmat(self, u: Tensor) -> Tensor:
            return self.matrix.T @ u

    @pytest.fixture
    def dense(self) -> Tensor:
        return torch.arange(12, dtype=torch.float64).reshape(3, 4).sin()

    @pytest.fixture
    def operator(self, dense: Tensor) -> base.LinearOperator:
        return self.Matrix(dense)

    def test_no_vec_order(self, operator: base.LinearOperator) -> None:
        with pytest.raises(ValueError, match="vec"):
            operator.to_dense(order="vec")
