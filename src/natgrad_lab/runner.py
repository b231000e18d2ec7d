"""One optimiser on one task: its own clock, batch order, running average and error, the same for every optimiser.

Inside the clock: drawing the mini-batch, the update, the running average. Outside: evaluation, records, pictures,
checkpoints.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.training import IterateAverage
from natgrad_lab import data
from natgrad_lab.optimizers import Competitor
from natgrad_lab.records import Evaluation

XI = 0.99  # of the running average theta_bar <- xi theta_bar + (1 - xi) theta [KFAC, sec. 13]
SUBSET = 2000  # training and test cases of an evaluation during the run; the final one takes all
EVALUATION_CHUNK = 1000


class Diverged(RuntimeError):
    """The loss, or the error, is no longer a finite number."""


class Clock:
    """Adds up wall time and this process's CPU time between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        """Start, once what the device was given before is done."""
        self._wait()
        self._started = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """Stop, once the device has done what it was given meanwhile."""
        if self._started is not None:
            self._wait()
            wall, cpu = self._started
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu
            self._started = None

    def read(self) -> float:
        """Wall seconds so far, running or not."""
        return self.seconds + (time.perf_counter() - self._started[0] if self._started else 0.0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Batches:
    """Mini-batches of any size, without replacement within an epoch; the order depends on (seed, epoch) alone.

    A batch that crosses the end of an epoch takes the rest from the next one. Its state is two integers.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator)

    def next(self, m: int) -> Tensor | slice:
        """Row numbers of the next `m` examples; everything, as a slice, when `m` is at least the number of examples."""
        if m >= self.size:
            return slice(None)
        rows = self._order[self.position : self.position + m]
        self.position += m
        if self.position >= self.size:
            self.epoch += 1
            self.position -= self.size
            self._order = self._permutation(self.epoch)
            rows = torch.cat([rows, self._order[: self.position]])
        return rows

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` stood."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._permutation(self.epoch)


@torch.no_grad()
def reconstruction_error(model: nn.Module, likelihood: Any, x: Tensor, y: Tensor) -> float:
    """`data.reconstruction_error` of a model in evaluation mode, in chunks."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(x), EVALUATION_CHUNK):
            rows = slice(start, start + EVALUATION_CHUNK)
            total += len(x[rows]) * data.reconstruction_error(likelihood, model(x[rows]), y[rows])
    finally:
        model.train(training)
    return float(total) / len(x)


class Runner:
    """Steps one competitor and measures it.

    Attributes:
        update, examples: Updates done and examples seen.
        loss: The mini-batch loss before the last update, as a 0-d tensor.
        average: The running average of the iterates.
        clock: Wall and CPU seconds of the updates.
    """

    def __init__(self, competitor: Competitor, task: Any, *, seed: int = 0, subset: int = SUBSET) -> None:
        self.competitor = competitor
        self.task = task
        self.average = IterateAverage(competitor.model, xi=XI)
        self.batches = Batches(len(task.x_train), seed)
        self.clock = Clock(task.x_train.device)
        self.update = 0
        self.examples = 0
        self.batch_size = 0
        self.loss: Tensor = torch.full((), math.nan)
        self._same_target = task.y_train is task.x_train
        # A finite loss costs nothing to check on the CPU; elsewhere each check would wait for the device.
        self._check_every = 1 if task.x_train.device.type == "cpu" else 20
        self._train_rows = _subset(len(task.x_train), subset, task.x_train.device)
        self._test_rows = _subset(len(task.x_test), subset, task.x_test.device)

    def advance(self) -> None:
        """One update.

        Raises:
            Diverged: the loss is not finite.
        """
        self.batch_size = min(self.competitor.batch_size(self.update + 1), len(self.task.x_train))
        rows = self.batches.next(self.batch_size)
        if isinstance(rows, Tensor):
            rows = rows.to(self.task.x_train.device)
        x = self.task.x_train[rows]
        y = x if self._same_target else self.task.y_train[rows]
        self.loss = self.competitor.step(x, y)
        self.update += 1
        self.examples += self.batch_size
        self.average.update_parameters(self.competitor.model)
        if self.update % self._check_every == 0:
            self.check()

    def check(self) -> None:
        """Raise `Diverged` if the last loss is not finite."""
        loss = float(self.loss)
        if not math.isfinite(loss):
            raise Diverged(f"the loss was {loss} at update {self.update}")

    def run_until(self, seconds: float, *, last: bool = False, after: Callable[["Runner"], None] | None = None) -> int:
        """Update until the clock reads `seconds`; returns how many updates were made.

        Args:
            seconds: On this runner's clock.
            last: Whether the time given to this optimiser ends here: then it stops where the end is nearest, so that
                an update of several seconds neither overruns by all of it nor leaves as much unused.
            after: Called after each update, inside the clock: it must be quick.
        """
        made = 0
        self.clock.start()
        try:
            now = self.clock.read()
            step = 0.0
            while now + (0.5 * step if last else 0.0) < seconds:
                self.advance()
                made += 1
                if after is not None:
                    after(self)
                before, now = now, self.clock.read()
                step = now - before
        finally:
            self.clock.stop()
        return made

    def evaluate(self) -> Evaluation:
        """The errors now, on fixed subsets of the training and test sets.

        Raises:
            Diverged: the error of the iterate is not finite.
        """
        task, rows = self.task, self._train_rows
        x, y = task.x_train[rows], task.y_train[rows]
        iterate = reconstruction_error(self.competitor.model, task.likelihood, x, y)
        if not math.isfinite(iterate):
            raise Diverged(f"the training error was {iterate} after update {self.update}")
        average = reconstruction_error(self.average.module, task.likelihood, x, y) if self.update else iterate
        better = self.competitor.model if iterate <= average else self.average.module
        test = reconstruction_error(better, task.likelihood, task.x_test[self._test_rows], task.y_test[self._test_rows])
        return Evaluation(
            optimizer=self.competitor.name,
            update=self.update,
            examples=self.examples,
            seconds=self.clock.seconds,
            cpu_seconds=self.clock.cpu_seconds,
            batch_size=self.batch_size,
            loss=float(self.loss),
            train_error=min(iterate, average),
            iterate_error=iterate,
            average_error=average,
            test_error=test,
        )

    def final_errors(self) -> tuple[float, float]:
        """Training and test error of the last parameters (the better of iterate and average) on the whole sets."""
        task = self.task
        errors = [
            (reconstruction_error(model, task.likelihood, task.x_train, task.y_train), model)
            for model in (self.competitor.model, self.average.module)
        ]
        train, better = min(errors, key=lambda pair: pair[0])
        return train, reconstruction_error(better, task.likelihood, task.x_test, task.y_test)

    def state_dict(self) -> dict[str, Any]:
        """All that an uninterrupted run would carry into its next update: tensors and plain scalars only."""
        return {
            "model": self.competitor.model.state_dict(),
            "optimizer": self.competitor.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "batches": self.batches.state_dict(),
            "update": self.update,
            "examples": self.examples,
            "batch_size": self.batch_size,
            "loss": float(self.loss),
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.competitor.model.load_state_dict(state["model"])
        self.competitor.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.batches.load_state_dict(state["batches"])
        self.update, self.examples, self.batch_size = state["update"], state["examples"], state["batch_size"]
        self.loss = torch.tensor(state["loss"])
        self.clock.seconds, self.clock.cpu_seconds = state["seconds"], state["cpu_seconds"]


def _subset(size: int, wanted: int, device: torch.device) -> Tensor | slice:
    """The same rows in every run, whatever its seed, so that errors can be compared between runs."""
    if wanted >= size:
        return slice(None)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:wanted].sort().values.to(device)
