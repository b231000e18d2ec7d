"""The operation count against the paper's summary and against products that PyTorch counts."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import natgrad as ng
from natgrad.curvature.block_inverse import FactoredInverse
from natgrad.diagnostics import kfac_operations, paper_coefficients
from natgrad.operators.chain import Chain

SIZES = [(7, 5), (5, 3), (3, 6)]
P = 35 + 15 + 18


def test_the_papers_summary() -> None:
    """3.425 C1 + 1.25 C2, 0.055 C3 and 1.1 C5, as printed for the published constants."""
    found = paper_coefficients()
    assert found["C1"] == pytest.approx(3.425) and found["C2"] == pytest.approx(1.25)
    assert found["C3"] == pytest.approx(0.055) == found["C4"] and found["C5"] == pytest.approx(1.1) == found["C6"]
    assert paper_coefficients(momentum=False)["C1"] == pytest.approx(3.425 - 0.55)


def test_a_wide_and_deep_network_approaches_the_summary() -> None:
    """ℓ equal layers: the first layer's missing derivative is 1/ℓ of a pass, everything else is as printed."""
    d, m, layers = 50, 400, 1000
    found = kfac_operations([(d, d)] * layers, m, bias=False, low_rank=False)
    C, unit = paper_coefficients(), layers * d * d * m
    parts = found.tasks
    passes = sum(parts[key] for key in parts if key[0] in "1378")
    assert passes == pytest.approx(C["C1"] * unit, rel=2 / layers)
    assert parts["2 gradient"] + parts["4 statistics"] == pytest.approx(C["C2"] * unit)
    assert parts["5 inverses"] == pytest.approx(C["C3"] * 2 * 0.5 * layers * d**3)  # A and G, half of d³ each
    assert parts["6 preconditioning"] == pytest.approx(C["C5"] * 2 * layers * d**3)
    assert found.sgd == pytest.approx(3 * unit, rel=1 / layers)
    assert found.ratio == pytest.approx(found.total / found.sgd)
    assert sum(found.relative().values()) == pytest.approx(found.ratio)
    assert "5 inverses" in str(found)


def counted(task) -> float:
    with FlopCounterMode(display=False) as counter:
        task()
    return counter.get_total_flops() / 2


def test_products_that_pytorch_counts() -> None:
    m = 11
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 6))
    x = torch.randn(m, 7)
    found = kfac_operations(SIZES, m, tau1=1.0, tau2=1.0, T1=1, T2=None, T3=1)
    assert counted(lambda: model(x).sum().backward()) == found.sgd == m * (3 * P - 35)
    with torch.no_grad():
        assert counted(lambda: model(x)) == found.tasks["8 forward pass for rho"]
    chain = Chain.of(ng.model_view.ModelView(model))
    assert chain is not None
    inputs = {"0": x, "2": torch.randn(m, 5), "4": torch.randn(m, 3)}
    backward = counted(lambda: chain.output_gradients(inputs, torch.randn(m, 6)))
    assert backward == found.tasks["3 backward pass with sampled targets"]
    direction = {
        name: (torch.randn_like(layer.weight), torch.randn_like(layer.bias))
        for name, layer in zip(chain.names, chain.layers, strict=True)
    }
    tangents = counted(lambda: chain.tangents(inputs, [direction, direction]))
    added_in_place = 2 * m * (15 + 18)  # which the counter does not see
    assert tangents + added_in_place == found.tasks["7 products with the exact F"]
    moments = counted(lambda: [g.T @ g for g in (torch.randn(m, d) for d in (7, 5, 5, 3, 3, 6))])
    assert moments == found.tasks["4 statistics"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_preconditioning(diagonal) -> None:
    found = kfac_operations([(4, 6)], 1000, T2=None, diagonal_output=diagonal)
    inverse = FactoredInverse(torch.randn(5, 5), torch.randn(6) if diagonal else torch.randn(6, 6), torch.tensor(True))
    assert counted(lambda: inverse.apply(torch.randn(6, 5))) == found.tasks["6 preconditioning"]
    ekfac = kfac_operations([(4, 6)], 1000, T2=None, structure="ekfac")
    assert ekfac.tasks["6 preconditioning"] == 2 * (6 * 25 + 36 * 5)
    assert ekfac.tasks["4 statistics"] == 125 * (16 + 36 + 16 + 24 + 36)
    few = kfac_operations([(4, 6)], 2, T2=None)
    assert few.tasks["6 preconditioning"] == 2 * (25 + 36 + 30)


def test_exact_structures_and_periods() -> None:
    plain = kfac_operations(SIZES, 100, T2=None)
    known = kfac_operations(SIZES, 100, T2=None, diagonal_output=True, static_input=True, statistics_every=2)
    assert known.tasks["4 statistics"] == 12.5 / 2 * (25 + 25 + 9 + 9)
    assert known.tasks["5 inverses"] == plain.tasks["5 inverses"] - 0.5 * 6**3 / 20
    tridiagonal = kfac_operations(SIZES, 100, T2=None, structure="block_tridiagonal")
    assert tridiagonal.tasks["4 statistics"] == plain.tasks["4 statistics"] + 12.5 * (35 + 15 + 15 + 18)
    one_pair = kfac_operations([(4, 6), (6, 3)], 1000, T2=None, structure="block_tridiagonal", low_rank=False)
    alone = kfac_operations([(4, 6), (6, 3)], 1000, T2=None, low_rank=False)
    pair = 2 * (3 * 6 * 5 + 3 * 5 * 5 + 3 * 3 * 7 + 3 * 7 * 5)  # ranks 5 and 3 of [6 x 5] and [3 x 7]
    assert one_pair.tasks["6 preconditioning"] == alone.tasks["6 preconditioning"] + pair
    added = 6.5 * 5**3 + 49 * 5 + 2 * 7 * 25 + 6.5 * 3**3 + 36 * 3 + 2 * 6 * 9
    assert one_pair.tasks["5 inverses"] == pytest.approx(alone.tasks["5 inverses"] + added / 20)
    with pytest.raises(ValueError, match="structure='full'"):
        kfac_operations(SIZES, 100, structure="full")
    with pytest.raises(ValueError, match="sizes"):
        kfac_operations([], 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": [784, 100, 10]}, r"sizes: expected \(inputs, outputs\) of every layer.*got \[784, 100, 10\]"),
        ({"m": 0}, "m=0: expected at least 1"),
        ({"T3": 0}, "T3=0: expected at least 1"),
        ({"tau1": 2}, "tau1=2: expected a share of the batch"),
        ({"tau2": float("nan")}, "tau2=nan: expected a share"),
    ],
)
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        kfac_operations(**{"sizes": SIZES, "m": 100, **settings})
