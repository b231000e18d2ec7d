"""One batch or several: what `kronecker_fisher` walks over, and the random stream that it draws from."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def batches_of(x: Any, y: Any = None, weight: Any = None) -> Iterator[tuple[Any, Any, Any]]:
    """(inputs, targets, weight) of every batch; a tensor, a tuple or a mapping is one batch.

    Raises:
        TypeError: x is an iterator, which could be iterated once only, or no iterable.
        ValueError: y or weight have another number of batches.
    """
    if isinstance(x, Tensor | tuple | Mapping):
        yield x, y, weight
        return
    if not isinstance(x, Iterable) or isinstance(x, Iterator):
        raise TypeError(
            f"x: expected one batch (a tensor, a tuple, a mapping) or a re-iterable of batches such as a list, "
            f"got {type(x).__name__}"
        )
    missing = object()
    others = [iter(other) if other is not None else None for other in (y, weight)]
    for batch in x:
        found = [None if other is None else next(other, missing) for other in others]
        if missing in [f for f in found if not isinstance(f, Tensor)]:
            raise ValueError("y, weight: fewer batches than x; pass one of each per batch")
        yield batch, found[0], found[1]


def following_global(device: torch.device) -> torch.Generator:
    """A generator that continues the global one, which stays where it is."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device=device).manual_seed(seed)
