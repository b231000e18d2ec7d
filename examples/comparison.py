"""What the examples share and a user need not copy: try learning rates fairly, print what came out, draw it.

Every method is trained once with each of equally many learning rates, with the same budget of steps; what counts is the
validation loss at the end. The picture shows the best run of each method.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Run:
    """What one training run found.

    Attributes:
        method: a name for the legend.
        lr: the learning rate.
        steps, seconds, losses: at every evaluation: steps taken, CPU-seconds spent on them, validation loss.
        score: of the last evaluation, in words (an accuracy, for example).
    """

    method: str
    lr: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    score: str = ""

    def add(self, step: int, seconds: float, loss: float, score: str) -> None:
        """Enter an evaluation."""
        self.steps.append(step)
        self.seconds.append(seconds)
        self.losses.append(loss)
        self.score = score

    def reached(self, loss: float) -> tuple[int, float] | None:
        """Steps and seconds after which the validation loss was first this low."""
        return next(((n, s) for n, s, v in zip(self.steps, self.seconds, self.losses, strict=True) if v <= loss), None)


class Clock:
    """CPU-seconds of this process while it runs, so that evaluations do not count."""

    def __init__(self) -> None:
        self.total, self._since = 0.0, time.process_time()

    def pause(self) -> float:
        """Stop; the total."""
        self.total += time.process_time() - self._since
        return self.total

    def resume(self) -> None:
        """Go on."""
        self._since = time.process_time()


def sweep(methods: dict[str, Sequence[float]], train: Callable[[str, float], Run]) -> dict[str, Run]:
    """Train every method with each of its learning rates; the best run of each, by its last validation loss."""
    best: dict[str, Run] = {}
    for method, rates in methods.items():
        for lr in rates:
            run = train(method, lr)
            print(f"{method}, lr {lr:g}: loss {run.losses[-1]:.4f}, {run.score}, {run.seconds[-1]:.0f} s", flush=True)
            # A run that diverged has a loss that is no number: never better.
            if method not in best or run.losses[-1] < best[method].losses[-1]:
                best[method] = run
    report(best)
    return best


def compare(
    options: argparse.Namespace, methods: dict[str, Sequence[float]], train: Callable[[str, float], Run], ylabel: str
) -> dict[str, Run]:
    """Train every method with as many of its learning rates as the options say; draw and return the best runs."""
    best = sweep({method: rates[: options.rates] for method, rates in methods.items()}, train)
    picture(options.out, best, ylabel)
    return best


def due(step: int, steps: int, evaluations: int) -> bool:
    """Whether the validation loss is evaluated after this step, counted from 1."""
    return step % max(1, steps // evaluations) == 0 or step == steps


def report(best: dict[str, Run]) -> None:
    """When the last method was where each of the others was at its best."""
    *others, ours = best.values()
    for run in others:
        target = min(run.losses)
        loss = f"loss {target:.4f}: "
        print(f"{loss}{run.method} (lr {run.lr:g}) {_spent(run, target)}")
        print(f"{'':{len(loss)}}{ours.method} (lr {ours.lr:g}) {_spent(ours, target)}")


def _spent(run: Run, loss: float) -> str:
    found = run.reached(loss)
    return f"not in {run.steps[-1]} steps" if found is None else f"after {found[0]} steps, {found[1]:.1f} s"


def picture(path: Path, best: dict[str, Run], ylabel: str) -> None:
    """Validation loss against steps and against CPU-seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogFormatter

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained", sharey=True)
    for run, style in zip(best.values(), ["-.", ":", "--", "-"][-len(best) :], strict=True):
        label = f"{run.method}, lr {run.lr:g}: {run.score}"
        axes[0].plot(run.steps, run.losses, style, label=label)
        axes[1].plot(run.seconds, run.losses, style, label=label)
    axes[0].set(xlabel="steps", ylabel=ylabel, yscale="log")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].yaxis.set_minor_formatter(LogFormatter())  # labels where a decade holds few
    axes[1].set(xlabel="CPU-seconds")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(path)


def positive(word: str) -> int:
    """A positive whole number, from the command line."""
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {word!r}")
    return int(word)


def arguments(description: str, out: str, steps: int, batch: int) -> argparse.ArgumentParser:
    """Options that all examples have."""
    parser = argparse.ArgumentParser(
        description=description.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=steps, help="of every run")
    parser.add_argument("--batch", type=positive, default=batch, help="examples in a step")
    parser.add_argument("--rates", type=positive, default=4, help="learning rates for each method, at most so many")
    parser.add_argument("--evaluations", type=positive, default=12, help="of the validation loss, in a run")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of the order of the examples")
    parser.add_argument("--out", type=Path, default=Path(out), help="the picture")
    return parser
