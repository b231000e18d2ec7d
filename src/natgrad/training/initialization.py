"""Initial weights: sparse [Martens 2010, sec. 5], and dense with a variance after Glorot or He [THESIS, sec. 2.4.2]."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def sparse_init_(
    model: nn.Module,
    k: int = 15,
    std: float = 1.0,
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give each unit of each `nn.Linear` `k` random incoming weights from N(0, std²); the others are zero.

    Units then neither saturate nor all compute the same, whatever the number of inputs, which lets deep networks of
    saturating units be trained from a random start: J. Martens, "Deep learning via Hessian-free optimization", ICML
    2010, sec. 5 (k = 15). Sutskever et al., "On the importance of initialization and momentum in deep learning",
    ICML 2013, use std = 1 for logistic units and std = 0.25 for tanh units.

    Args:
        model: Changed in place. Modules other than `nn.Linear` are left alone.
        k: Incoming weights per unit; units with fewer inputs get all of them.
        std: Standard deviation of those weights.
        bias: Value of every bias.
        generator: Source of randomness; PyTorch's global one if None. Drawn in float64 on its device, so the same
            generator gives the same numbers whatever the model's device and dtype.

    Returns:
        The model.

    Raises:
        ValueError: `k` below 1, negative `std`, or a model without `nn.Linear`.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least one incoming weight per unit")
    if not std >= 0.0:
        raise ValueError(f"std is {std}; expected a standard deviation of at least 0")
    for layer in _layers(model):
        layer.weight.copy_(_sparse_rows(layer.out_features, layer.in_features, k, std, generator))
        if layer.bias is not None:
            layer.bias.fill_(bias)
    return model


@torch.no_grad()
def glorot_init_(
    model: nn.Module,
    alpha: float = 2.0,
    distribution: str = "uniform",
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Weights of each `nn.Linear` with the variance ``alpha / (n_in + n_out)`` [THESIS, sec. 2.4.2].

    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, keep the
    signal's size in both directions with alpha = 2. The thesis takes alpha as a hyper-parameter.

    Args:
        model: Changed in place. Modules other than `nn.Linear` are left alone.
        alpha: The variance in units of 1 / (n_in + n_out).
        distribution: "uniform", as Glorot and Bengio have it, or "normal".
        bias: Value of every bias.
        generator: Source of randomness, as for `sparse_init_`.

    Returns:
        The model.

    Raises:
        ValueError: `alpha` negative, another distribution, or a model without `nn.Linear`.
    """
    return _dense_init_(
        model, alpha, lambda layer: layer.in_features + layer.out_features, distribution, bias, generator
    )


@torch.no_grad()
def he_init_(
    model: nn.Module,
    alpha: float = 2.0,
    distribution: str = "normal",
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Weights of each `nn.Linear` with the variance ``alpha / n_in`` [THESIS, sec. 2.4.2].

    K. He et al., "Delving deep into rectifiers", 2015, keep the signal's size forwards through ReLUs with alpha = 2.

    Args:
        model: Changed in place. Modules other than `nn.Linear` are left alone.
        alpha: The variance in units of 1 / n_in.
        distribution: "normal", as He et al. have it, or "uniform".
        bias: Value of every bias.
        generator: Source of randomness, as for `sparse_init_`.

    Returns:
        The model.

    Raises:
        ValueError: `alpha` negative, another distribution, or a model without `nn.Linear`.
    """
    return _dense_init_(model, alpha, lambda m: m.in_features, distribution, bias, generator)


def _dense_init_(
    model: nn.Module,
    alpha: float,
    fan: Callable[[nn.Linear], int],
    distribution: str,
    bias: float,
    generator: torch.Generator | None,
) -> nn.Module:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; expected a finite variance of at least 0, such as 2")
    if distribution not in ("uniform", "normal"):
        raise ValueError(f"distribution is {distribution!r}; expected 'uniform' or 'normal'")
    device = torch.device("cpu") if generator is None else generator.device
    for layer in _layers(model):
        std = math.sqrt(alpha / fan(layer))
        shape = (layer.out_features, layer.in_features)
        if distribution == "normal":
            values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        else:  # of variance 1
            values = (torch.rand(shape, generator=generator, dtype=torch.float64, device=device) * 2 - 1) * math.sqrt(3)
        layer.weight.copy_(values * std)
        if layer.bias is not None:
            layer.bias.fill_(bias)
    return model


def _layers(model: nn.Module) -> list[nn.Linear]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear module: there is nothing to initialise")
    return layers


def _sparse_rows(rows: int, columns: int, k: int, std: float, generator: torch.Generator | None) -> Tensor:
    """Zeros but for min(k, columns) entries from N(0, std²) in random places of each row."""
    device = torch.device("cpu") if generator is None else generator.device
    k = min(k, columns)
    # The places of the k largest of i.i.d. numbers are a random subset of size k.
    places = torch.rand(rows, columns, generator=generator, dtype=torch.float64, device=device).topk(k, dim=1).indices
    values = std * torch.randn(rows, k, generator=generator, dtype=torch.float64, device=device)
    return torch.zeros(rows, columns, dtype=torch.float64, device=device).scatter_(1, places, values)
