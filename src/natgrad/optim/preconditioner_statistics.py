"""What a `Preconditioner` observed since its last step: micro-batches add up, then ranks; and what it reports."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.curvature.base import Factors, Statistics, factors_from
from natgrad.curvature.loss_statistics import LossStatistics
from natgrad.distributed import collectives
from natgrad.layers.coverage import Coverage
from natgrad.optim.settings import Periods, Renewal
from natgrad.optim.stats import Stats

if TYPE_CHECKING:
    from natgrad.optim.preconditioner import Preconditioner


class Pending:
    """Sums of the micro-batches of one step.

    Attributes:
        missed: how many steps wanted statistics and had none.
    """

    def __init__(self) -> None:
        self.missed = 0
        self._sum: Statistics | None = None
        self._open: list[LossStatistics] = []

    def __bool__(self) -> bool:
        return self._sum is not None or bool(self._open)

    def add(self, statistics: Statistics) -> None:
        """One more micro-batch."""
        self._sum = statistics if self._sum is None else self._sum + statistics

    def expect(self, batch: LossStatistics) -> None:
        """A micro-batch that is complete after the backward pass of its loss."""
        self._close([batch for batch in self._open if batch.complete])
        self._open.append(batch)

    def take(self, device: torch.device, step: int) -> Statistics | None:
        """The sums over micro-batches and ranks, which leave this object; None where nothing was observed.

        Args:
            device: of the model.
            step: its number, for a warning.

        Raises:
            RuntimeError: only some ranks observed something, or they observed different models.
            RuntimeError, ValueError: as :meth:`LossStatistics.statistics`.
        """
        try:
            self._close(list(self._open))
            found = over_ranks(self._sum, device) if collectives.world_size() > 1 else self._sum
        finally:
            self.clear()
        if found is None:
            self._miss(step)
        return found

    def _miss(self, step: int) -> None:
        self.missed += 1
        if self.missed == 1:
            warnings.warn(
                f"step {step} wants statistics and nothing was observed: call observe(z) or update(inputs) at every "
                "step (they do nothing when nothing is due), or the curvature gets old; said once, counted in "
                "stats['missed']",
                stacklevel=5,
            )

    def clear(self) -> None:
        """Forget everything."""
        for batch in self._open:
            batch.drop()
        self._sum, self._open = None, []

    def _close(self, batches: list[LossStatistics]) -> None:
        for batch in batches:
            self.add(batch.statistics())
            self._open.remove(batch)


def estimated(statistics: Statistics) -> dict[str, Factors]:
    """The factors of the layers that an observed output depends on.

    Of others nothing is known: zero would mean that the curvature is.

    Raises:
        RuntimeError: there are none.
    """
    found = {name: factors for name, factors in factors_from(statistics).items() if statistics.has(name)}
    if not found:
        raise RuntimeError(
            "the output that was observed depends on no covered layer (detached in the model, under torch.no_grad(), "
            "or inside torch.utils.checkpoint with use_reentrant=True)"
        )
    return found


def over_ranks(own: Statistics | None, device: torch.device) -> Statistics | None:
    """Statistics of the examples of all ranks; None where no rank has any. Every rank has to call it.

    The count is a sum also where the loss is a plain sum: the curvature then is that of the mean of the ranks' losses,
    whose gradient ``DistributedDataParallel`` computes.

    Raises:
        RuntimeError: only some ranks have statistics, or they are of different shapes; every rank raises it.
    """
    state = {} if own is None else own.state()
    additive = state.pop("additive", torch.tensor(True))
    if not collectives.agree(sum(tensor.numel() for tensor in state.values()), device):
        raise RuntimeError(
            "the ranks of this process group have statistics of different sizes: call observe() or update() on every "
            "rank ahead of a step, with the same model and settings"
        )
    if own is None:
        return None
    return Statistics.from_state({**collectives.summed(state, device), "additive": additive})


def report(pre: "Preconditioner", nu: Tensor | float, bare: int) -> Stats:
    """The numbers of a step, tensors as such.

    Args:
        pre: that made it.
        nu: the mean scale of its layers.
        bare: how many layers have no inverse.
    """
    return Stats(
        {
            "steps": pre._steps,
            "damping": pre.damping,
            "nu": nu,
            "skipped": pre._skipped,
            "nonfinite": pre._nonfinite,
            "missed": pre._pending.missed,
            "failed_inverses": pre._inverses.failures,
            "bare": bare,
            "rows": getattr(pre.periods, "rows", 1.0),
            "positions": getattr(pre.periods, "positions", 1.0),
        }
    )


def noted(coverage: Coverage, periods: Periods) -> Coverage:
    """Coverage with what is left out of the sums behind the factors, where something is."""
    if not isinstance(periods, Renewal) or periods.rows == periods.positions == 1:
        return coverage
    shares = f"{periods.rows:.3g} of the examples and, of A, {periods.positions:.3g} of the positions"
    return replace(coverage, notes=(f"factors from {shares}",))
