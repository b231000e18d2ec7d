"""The autoencoders: sizes, initialisation, independence of the global random stream."""

import pytest
import torch
from torch import nn

from natgrad_lab.models import ENCODERS, autoencoder


@pytest.mark.parametrize(
    ("task", "parameters", "layers"),
    [("curves", 842_340, 12), ("mnist", 2_837_314, 8), ("faces", 7_537_655, 8), ("digits", 26_224, 8)],
)
def test_sizes(task: str, parameters: int, layers: int) -> None:
    model = autoencoder(ENCODERS[task])
    linear = [m for m in model if isinstance(m, nn.Linear)]
    assert len(linear) == layers
    assert sum(p.numel() for p in model.parameters()) == parameters
    sizes = [linear[0].in_features, *(m.out_features for m in linear)]
    assert sizes == sizes[::-1] and tuple(sizes[: layers // 2 + 1]) == ENCODERS[task]


def test_code_and_output_layers_are_linear() -> None:
    kinds = [type(m).__name__ for m in autoencoder((8, 6, 4, 2), activation="sigmoid")]
    assert kinds == [
        *("Linear", "Sigmoid", "Linear", "Sigmoid", "Linear"),
        *("Linear", "Sigmoid", "Linear", "Sigmoid", "Linear"),
    ]


@pytest.mark.parametrize(("activation", "std"), [("tanh", 0.25), ("sigmoid", 1.0)])
def test_initial_weights(activation: str, std: float) -> None:
    model = autoencoder((784, 400, 6), activation=activation, seed=1)
    linear = [m for m in model if isinstance(m, nn.Linear)]
    for m in linear:
        assert torch.equal((m.weight != 0).sum(1), torch.full((m.out_features,), min(15, m.in_features)))
        assert not m.bias.any()
    entries = torch.cat([m.weight[m.weight != 0].detach() for m in linear])  # 20 250 draws
    assert float(entries.std()) == pytest.approx(std, rel=0.02)


def test_seeds() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (autoencoder((16, 8, 2), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)
    tanh, sigmoid = autoencoder((16, 8, 2), seed=3), autoencoder((16, 8, 2), seed=3, activation="sigmoid")
    torch.testing.assert_close(4.0 * tanh[0].weight, sigmoid[0].weight)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="activation is 'relu'; expected 'tanh' or 'sigmoid'"):
        autoencoder((4, 2), activation="relu")
    with pytest.raises(ValueError, match=r"encoder is \(4,\)"):
        autoencoder((4,))
