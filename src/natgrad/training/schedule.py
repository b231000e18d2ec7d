"""Mini-batch sizes that grow during training [KFAC, sec. 13]."""

import math


class ExponentialBatchSize:
    """Mini-batch size m_k = min(start · exp((k - 1) / b), final), b chosen so that m_at = final [KFAC, sec. 13].

    Small batches early, when the gradient's noise matters little; large ones late, when it limits progress. The papers
    use `start` = 1000, `final` = the size of the training set, `at` = 500.

    Args:
        start: Batch size of the first update.
        final: Largest batch size, usually the number of training cases; at least `start`.
        at: Number (from 1) of the first update with the final size.

    Raises:
        ValueError: a size or `at` below 1, or `start` above `final`.

    Calling it with an update number k = 1, 2, … returns the batch size, rounded to an integer.
    """

    def __init__(self, start: int = 1000, final: int = 60000, at: int = 500) -> None:
        for name, value in (("start", start), ("final", final), ("at", at)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected a whole number of at least 1")
        if start > final:
            raise ValueError(
                f"start ({start}) is larger than final ({final}); the batch only grows: use min({start}, {final})"
            )
        self.start = int(start)
        self.final = int(final)
        self.at = int(at)

    def __call__(self, k: int) -> int:
        """Batch size of update number `k`, counted from 1."""
        if k < 1:
            raise ValueError(f"k is {k}; updates are counted from 1")
        if k >= self.at:
            return self.final
        # exp((k-1)/b) with b = (at-1)/log(final/start).
        grown = self.start * math.exp((k - 1) / (self.at - 1) * math.log(self.final / self.start))
        return min(round(grown), self.final)

    def __repr__(self) -> str:
        return f"ExponentialBatchSize(start={self.start}, final={self.final}, at={self.at})"


class HyperbolicDecay:
    """The factor ``1 / (1 + (t − after) / scale)`` of the learning rate at update t, 1 before [NATGRAD, sec. 8.6].

    For ``torch.optim.lr_scheduler.LambdaLR(optimizer, HyperbolicDecay())``, stepped once per update; with the published
    constants the learning rate is constant for 200 updates, half of it after 20 more.

    Args:
        after: The last update (from 1) at the full learning rate.
        scale: Updates until the learning rate is halved.

    Raises:
        ValueError: `after` below 0, or `scale` not above 0.
    """

    def __init__(self, after: int = 200, scale: float = 20.0) -> None:
        if after < 0 or not scale > 0:
            raise ValueError(
                f"after is {after}, scale {scale}; expected at least 0 and a number above 0, as 200 and 20"
            )
        self.after = after
        self.scale = scale

    def __call__(self, steps: int) -> float:
        """The factor for the update that follows so many; that update is number t = ``steps + 1``."""
        return 1 / (1 + max(steps + 1 - self.after, 0) / self.scale)

    def __repr__(self) -> str:
        return f"HyperbolicDecay(after={self.after}, scale={self.scale})"
