"""Batches that do not fit, given to every operator: the error names the thing and says what was expected."""

from collections.abc import Callable
from typing import Any

import pytest
from oracles import networks
from torch import Tensor

import natgrad as ng

WITH_TARGETS: dict[str, Callable[..., Any]] = {
    "GaussNewton": ng.GaussNewton,
    "Hessian": ng.Hessian,
    "EmpiricalFisher": ng.EmpiricalFisher,
    "GradientCovariance": ng.GradientCovariance,
    "kronecker_fisher": lambda model, likelihood, x, y: ng.kronecker_fisher(
        model, likelihood, x, structure="block_diagonal", expectation="empirical", y=y
    ),
}
OPERATORS = WITH_TARGETS | {
    "Fisher": lambda model, likelihood, x, y: ng.Fisher(model, likelihood, x),
    "Jacobian": lambda model, likelihood, x, y: ng.Jacobian(model, x),
}
INPUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another dtype": (lambda x: x.float(), r"inputs: .*float32.*\.to\(torch.float64\)"),
    "another device": (lambda x: x.to("meta"), "inputs: .*on meta, the model on cpu; move one"),
    "no examples": (lambda x: x[:0], "inputs: the batch is empty.*at least one example"),
    "nan": (lambda x: x * float("nan"), "not (all )?finite; look for NaN or infinit"),
    "infinity": (lambda x: x / 0, "not (all )?finite; look for NaN or infinit"),
}
TARGETS: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "another width": ("gaussian", lambda y: y[:, :1], r"targets: expected shape \(4, 2\).*got \(4, 1\)"),
    "fewer": ("gaussian", lambda y: y[:2], r"targets: expected shape \(4, 2\).*got \(2, 2\)"),
    "another device": ("gaussian", lambda y: y.to("meta"), "targets: on meta, .* on cpu; move one"),
    "a class too many": ("categorical", lambda y: y + 2, "targets: .*expected classes from 0 to 1"),
    "real classes": ("categorical", lambda y: y.double(), r"targets: .*integer classes.*y\.long\(\)"),
}
LIKELIHOODS = {"gaussian": ng.Gaussian(), "categorical": ng.Categorical()}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs(operator: str, kind: str) -> None:
    case, (spoil, message) = networks.case("mlp"), INPUTS[kind]
    y = networks.targets("gaussian", case.z)
    with pytest.raises(ValueError, match=message):
        OPERATORS[operator](case.model, ng.Gaussian(), spoil(case.x), y)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("operator", WITH_TARGETS)
def test_targets(operator: str, kind: str) -> None:
    case, (family, spoil, message) = networks.case("mlp"), TARGETS[kind]
    y = networks.targets(family, case.z)
    with pytest.raises(ValueError, match=message):
        WITH_TARGETS[operator](case.model, LIKELIHOODS[family], case.x, spoil(y)).to_dense()
