"""Condition numbers and π by layer, against dense matrices."""

import math

import pytest
import torch
from oracles.classifier import LIKELIHOOD, blobs, mlp
from torch import Tensor, nn

import natgrad as ng
from natgrad.curvature.base import Diagonal, Factors
from natgrad.diagnostics import layer_health


def spd(n: int, seed: int) -> Tensor:
    root = torch.randn(n, n + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / n


def cond(M: Tensor) -> float:
    return float(torch.linalg.cond(M))


@pytest.mark.parametrize("diagonal", [False, True])
def test_against_dense_matrices(diagonal: bool) -> None:
    A, G = spd(5, 0), 0.01 * spd(3, 1)
    if diagonal:
        G = torch.diag(G.diagonal())
    factors = {"a": Factors(A, Diagonal(G.diagonal()) if diagonal else G)}
    lam = 0.02
    pi = math.sqrt((A.trace() / 5) / (G.trace() / 3))
    eye_a, eye_g = torch.eye(5, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    factored = torch.kron(A + pi * math.sqrt(lam) * eye_a, G + math.sqrt(lam) / pi * eye_g)
    exact = torch.kron(A, G) + lam * torch.eye(15, dtype=torch.float64)
    for form, damped in ((ng.FactoredTikhonov(), factored), (ng.ExactTikhonov(), exact)):
        found = layer_health(factors, lam, form)["a"]
        assert found.condition_A == pytest.approx(cond(A), rel=1e-9)
        assert found.condition_G == pytest.approx(cond(G), rel=1e-9)
        assert found.pi == pytest.approx(pi, rel=1e-12)
        assert found.condition == pytest.approx(cond(damped), rel=1e-9)
    assert layer_health(factors, {"a": lam}) == layer_health(factors, lam)
    assert layer_health(factors)["a"].condition == pytest.approx(cond(torch.kron(A, G)), rel=1e-9)


def test_a_stack_reports_its_worst_block() -> None:
    A, G = torch.stack([spd(4, 0), spd(4, 2)]), torch.stack([spd(2, 3), 5 * spd(2, 4)])
    found = layer_health({"s": Factors(A, G)}, 0.1)["s"]
    alone = [layer_health({"s": Factors(a, g)}, 0.1)["s"] for a, g in zip(A, G, strict=True)]
    assert found.condition_A == pytest.approx(max(one.condition_A for one in alone))
    assert found.condition == pytest.approx(max(one.condition for one in alone))
    assert found.pi == pytest.approx(math.sqrt(alone[0].pi * alone[1].pi))


def test_singular_zero_and_broken_factors() -> None:
    v = torch.arange(1.0, 5.0)
    dead = layer_health({"x": Factors(torch.outer(v, v), torch.eye(2))}, 0.5)["x"]
    assert dead.condition_A == math.inf and dead.condition_G == 1.0 and 1 < dead.condition < math.inf
    zero = layer_health({"x": Factors(torch.zeros(3, 3), torch.eye(2))}, 0.5)["x"]
    assert (zero.condition_A, zero.pi, zero.condition) == (1.0, 1.0, 1.0)
    broken = layer_health({"x": Factors(torch.full((3, 3), torch.nan), torch.eye(2))}, 0.5)["x"]
    assert math.isnan(broken.condition_A) and broken.condition_G == 1.0 and math.isnan(broken.condition)
    assert layer_health({}) == {}


@pytest.mark.parametrize("structure", ["block_diagonal", "ekfac", "input_covariance"])
def test_of_a_preconditioner(structure: str) -> None:
    model = mlp(20, 16, 8, dtype=torch.float64)
    pre = ng.Preconditioner(model, LIKELIHOOD, structure=structure, damping={"": 0.01, "2": 0.1}, alpha=0.3)
    assert ng.health(pre) == {}
    x, _ = blobs(300)
    pre.update(x.double())
    model(x.double()).sum().backward()
    optimizer = ng.Preconditioned(torch.optim.SGD(model.parameters(), lr=0.1), pre)
    optimizer.step()
    found = ng.health(optimizer)
    assert list(found) == ["0", "2"]
    for name, lam in (("0", 0.01), ("2", 0.1)):
        factors = pre._running.factors[name]
        A, G = (f.to_dense() if isinstance(f, Diagonal) else f for f in (factors.A, factors.G))
        assert found[name].condition_A == pytest.approx(cond(A), rel=1e-6)
        eyes = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
        if structure == "input_covariance":
            assert G.diagonal().tolist() == pytest.approx([0.3] * len(G))
            assert found[name].condition == pytest.approx(cond(A + lam / 0.3 * eyes[0]), rel=1e-6)
        elif structure == "ekfac":
            dense = torch.kron(A, G) + lam * torch.eye(len(A) * len(G), dtype=A.dtype)
            assert found[name].condition == pytest.approx(cond(dense), rel=1e-6)
        else:
            split = found[name].pi * math.sqrt(lam), math.sqrt(lam) / found[name].pi
            parts = [cond(M + s * eye) for M, s, eye in zip((A, G), split, eyes, strict=True)]
            assert found[name].condition == pytest.approx(parts[0] * parts[1], rel=1e-6)


def test_of_the_whole_model_optimisers() -> None:
    x, y = blobs(300)
    for make in (ng.KFAC, ng.EigenAdam):
        model = mlp(20, 16, 8)
        optimizer = make(model, LIKELIHOOD)
        optimizer.step(x, y)
        found = ng.health(optimizer)
        assert list(found) == ["0", "2"] and all(h.condition_A >= 1 and h.pi > 0 for h in found.values())
    tridiagonal = ng.KFAC(nn.Sequential(*mlp(20, 16, 8)), LIKELIHOOD, structure="block_tridiagonal")
    tridiagonal.step(x, y)
    assert list(ng.health(tridiagonal)) == ["0", "2"]
    with pytest.raises(TypeError, match="your own object"):
        ng.health(torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
