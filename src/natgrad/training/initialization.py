"""Sparse initialisation of deep networks [Martens 2010, sec. 5]."""

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
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear module: there is nothing to initialise sparsely")
    for layer in layers:
        layer.weight.copy_(_sparse_rows(layer.out_features, layer.in_features, k, std, generator))
        if layer.bias is not None:
            layer.bias.fill_(bias)
    return model


def _sparse_rows(rows: int, columns: int, k: int, std: float, generator: torch.Generator | None) -> Tensor:
    """Zeros but for min(k, columns) entries from N(0, std²) in random places of each row."""
    device = torch.device("cpu") if generator is None else generator.device
    k = min(k, columns)
    # The places of the k largest of i.i.d. numbers are a random subset of size k.
    places = torch.rand(rows, columns, generator=generator, dtype=torch.float64, device=device).topk(k, dim=1).indices
    values = std * torch.randn(rows, k, generator=generator, dtype=torch.float64, device=device)
    return torch.zeros(rows, columns, dtype=torch.float64, device=device).scatter_(1, places, values)
