"""Vectors that change by sums of one another and of new ones: kept as coefficients, formed a few steps at a time.

A short recurrence of long vectors, such as that of the solution in MINRES-QLP, costs several passes over memory per
step when it is carried out at once. Carried out on coefficients it costs one matrix product every few steps.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# On a CPU the products are taken in blocks of so many columns, whose results stay in its cache.
_BLOCK = 2**15


class DeferredVectors:
    """A few carried vectors, zero at first, as combinations of what they were and of the new vectors since then.

    Args:
        like: a vector, for size, dtype and device.
        carried: how many vectors there are.
        room: memory for so many new vectors, at least three.

    Attributes:
        coefficients: of the carried vectors, a row each, in the rows of memory: the carried vectors as they were formed
            last, and the new ones since; in double precision on the host. To be changed.
        used: how many rows hold a vector.
    """

    def __init__(self, like: Float[Tensor, " n"], carried: int, room: int) -> None:
        self.carried = self.used = carried
        self._rows = like.new_empty(carried + room, like.numel())
        self._rows[:carried] = 0
        self.coefficients = torch.eye(carried, carried + room, dtype=torch.float64, device="cpu")

    def place(self) -> Float[Tensor, " n"]:
        """Memory for the next new vector; where there is none left, all new ones but the last two are given up."""
        if self.used == len(self._rows):
            self._form_all()
        return self._rows[self.used]

    def append(self) -> int:
        """Take in what was written to the place; the index of its row."""
        self.used += 1
        return self.used - 1

    def newest(self, i: int) -> Float[Tensor, " n"]:
        """The i-th last vector; where there are not so many new ones yet, a carried one."""
        return self._rows[self.used - i]

    def form(self, coefficients: Float[Tensor, " rows"]) -> Float[Tensor, " n"]:
        """One combination of the rows in use."""
        rows = self._rows[: self.used]
        return rows.T @ coefficients[: self.used].to(rows.device, rows.dtype)

    def _form_all(self) -> None:
        rows, carried = self._rows, self.carried
        coefficients = self.coefficients.to(rows.device, rows.dtype)
        for block in rows.split(_BLOCK if rows.device.type == "cpu" else rows.shape[1], dim=1):
            block[:carried].copy_(coefficients @ block)
        for place, vector in zip(rows[carried:], rows[-2:], strict=False):
            place.copy_(vector)
        torch.eye(*self.coefficients.shape, dtype=torch.float64, out=self.coefficients)
        self.used = carried + 2
