"""An optimiser's numbers for TensorBoard, Weights & Biases and whatever else takes a dict of numbers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from natgrad.optim.health import health
from natgrad.optim.preconditioned import Preconditioned
from natgrad.optim.preconditioner import Preconditioner
from natgrad.optim.scaling import KLClip

Write = Callable[[dict[str, float], int], Any]


class StatsLogger:
    """Writes what an optimiser reports about its steps, and now and then the health of every layer's factors.

    ::

        logger = ng.training.StatsLogger(optimizer, SummaryWriter("runs/one"), every=10, health_every=200)
        for x, y in batches:
            ...
            optimizer.step()
            logger.step(loss=loss)

    Written every ``every`` steps: the entries of ``stats`` (see the optimiser), ``lr`` of the first parameter group
    where the optimiser has groups, for a `Preconditioner` with `KLClip` ``clipped``, the share of the steps since the
    last time at which ν was below 1, and for `Preconditioned` ``skipped_steps``. Every ``health_every`` steps, by layer
    as ``layers/NAME/…``: ``condition_A``, ``condition_G``, ``pi`` and ``condition``
    (`natgrad.diagnostics.LayerHealth`). Other steps read nothing from the device. The number of a step is the
    optimiser's own, so that a resumed run goes on where the log ends.

    Args:
        optimizer: any optimiser of natgrad with ``stats``, a `Preconditioner` or `Preconditioned`.
        write: ``write(numbers, step)`` with a dict of Python floats, such as ``wandb.log`` or Accelerate's
            ``accelerator.log``; or a TensorBoard ``SummaryWriter`` (anything with its ``add_scalar``).
        every: write statistics at steps that are divisible by it.
        health_every: the same for the health; 0 for never.
        prefix: of all names.

    Raises:
        TypeError: the optimiser has no stats, or nothing can be written to ``write``.
        ValueError: a period out of range.
    """

    def __init__(
        self, optimizer: Any, write: Write | Any, *, every: int = 1, health_every: int = 0, prefix: str = "natgrad/"
    ) -> None:
        source = optimizer.pre if isinstance(optimizer, Preconditioned) else optimizer
        if not hasattr(source, "stats"):
            raise TypeError(
                "optimizer: expected an optimiser of natgrad, a Preconditioner or Preconditioned (inside other loops: "
                f"your own object, not the loop's wrapper), got {type(optimizer).__name__}"
            )
        if not hasattr(write, "add_scalar") and not callable(write):
            raise TypeError(
                f"write: expected write(numbers, step) or a TensorBoard SummaryWriter, got {type(write).__name__}"
            )
        if every < 1 or health_every < 0:
            raise ValueError(f"every={every}, health_every={health_every}: expected steps, at least 1 and at least 0")
        self.optimizer, self.every, self.health_every, self.prefix = optimizer, every, health_every, prefix
        self._source, self._write = source, write
        self._clipped: Tensor | float = 0.0
        self._steps, self._last = 0, -1

    @torch.no_grad()
    def step(self, **others: float | Tensor) -> None:
        """Call once after each step of the optimiser.

        Args:
            others: more numbers to be written beside the statistics; tensors are read where they are written.

        Raises:
            RuntimeError: the optimiser has not made a step yet.
        """
        stats = self._source.stats
        if not len(stats):
            raise RuntimeError("StatsLogger.step(): the optimiser has made no step yet; call it after optimizer.step()")
        number = int(stats.unread("steps" if "steps" in stats else "updates"))
        if number == self._last:  # Preconditioned left a step out
            return
        self._last = number
        self._steps += 1
        if self._clips:
            self._clipped = self._clipped + (stats.unread("nu") < 1)
        numbers: dict[str, float] = {}
        if number % self.every == 0:
            numbers |= _plain({**stats, **self._more(), **others})
            self._clipped, self._steps = 0.0, 0
        if self.health_every and number % self.health_every == 0:
            found = health(self.optimizer)
            numbers |= _plain({f"layers/{name}": asdict(layer) for name, layer in found.items()})
        if numbers:
            self._out({f"{self.prefix}{name}": value for name, value in numbers.items()}, number)

    @property
    def _clips(self) -> bool:
        return isinstance(self._source, Preconditioner) and isinstance(self._source.scaling, KLClip)

    def _more(self) -> dict[str, Any]:
        more: dict[str, Any] = {}
        groups = getattr(self.optimizer, "param_groups", None)
        if groups:
            more["lr"] = groups[0]["lr"]
        if self._clips:
            more["clipped"] = self._clipped / self._steps
        if isinstance(self.optimizer, Preconditioned):
            more["skipped_steps"] = self.optimizer.skipped
        return more

    def _out(self, numbers: dict[str, float], step: int) -> None:
        if hasattr(self._write, "add_scalar"):
            for name, value in numbers.items():
                self._write.add_scalar(name, value, step)
        else:
            self._write(numbers, step)


def _plain(values: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """Python floats under names with slashes.

    A mapping (λ by layer) becomes one number for each entry; words are left out.
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers |= _plain(value, f"{above}{name}/")
        elif not isinstance(value, str | None):
            numbers[f"{above}{name}"] = float(value)
    return numbers
