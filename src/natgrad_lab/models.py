"""The deep autoencoders of the benchmark: three of Hinton & Salakhutdinov (2006), and a small one for the digits."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from natgrad.training import sparse_init_

Activation = Literal["tanh", "sigmoid"]

# Units from the pixels to the code; the decoder mirrors them.
ENCODERS: dict[str, tuple[int, ...]] = {
    "curves": (784, 400, 200, 100, 50, 25, 6),
    "mnist": (784, 1000, 500, 250, 30),
    "faces": (625, 2000, 1000, 500, 30),
    "digits": (64, 100, 50, 25, 10),
}

# Sutskever et al. (2013), sec. 3: weights of N(0, 1) for logistic units; a quarter of that for tanh units, which are
# logistic units of twice the input, stretched to twice the range. (They also set the biases of tanh units to 0.5,
# which this bench does not.)
INITIAL_STD: dict[str, float] = {"sigmoid": 1.0, "tanh": 0.25}


def autoencoder(encoder: Sequence[int], *, activation: Activation = "tanh", seed: int = 0) -> nn.Sequential:
    """A deep autoencoder, initialised sparsely [Martens 2010], as in [KFAC, sec. 13].

    Args:
        encoder: Numbers of units from the input to the code layer; the decoder mirrors them.
        activation: Of the hidden units, "tanh" or "sigmoid". The code layer and the output layer are linear: outputs
            are logits under a Bernoulli likelihood, means under a Gaussian one.
        seed: Of the initial weights: 15 incoming weights per unit from N(0, 1) for logistic and N(0, 0.25²) for tanh
            units, biases 0. PyTorch's global random stream is left alone.

    Raises:
        ValueError: fewer than two sizes, or an unknown activation.
    """
    if len(encoder) < 2:
        raise ValueError(f"encoder is {tuple(encoder)}; expected at least an input and a code layer, as in (784, 30)")
    units = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
    if activation not in units:
        raise ValueError(f"activation is {activation!r}; expected 'tanh' or 'sigmoid'")
    sizes = [*encoder, *reversed(encoder[:-1])]
    code, output = len(encoder) - 1, len(sizes) - 1
    layers: list[nn.Module] = []
    for i in range(1, len(sizes)):
        layers.append(nn.utils.skip_init(nn.Linear, sizes[i - 1], sizes[i]))
        if i not in (code, output):
            layers.append(units[activation]())
    model = nn.Sequential(*layers)
    sparse_init_(model, k=15, std=INITIAL_STD[activation], generator=torch.Generator().manual_seed(seed))
    return model
