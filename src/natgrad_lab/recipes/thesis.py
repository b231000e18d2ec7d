"""Figures and tables of George (2017) [THESIS]: those of the search for hyper-parameters, sec. 2.3 and 4.1."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from torch import Tensor

from natgrad_lab import labelled
from natgrad_lab.recipes import thesis_methods
from natgrad_lab.recipes.base import Size, recipe
from natgrad_lab.recipes.many import final_costs
from natgrad_lab.recipes.run import Run
from natgrad_lab.search import BiasedRandomSampler
from natgrad_lab.search.spaces import grid
from natgrad_lab.search.study import Grid, quiet

__all__ = ["thesis_methods"]  # figures 6.1 and 6.2, section 4.3

METHODS = ("grid", "random", "biased")
AT_ONCE = 50  # networks that are trained together

# The task of sec. 4.2 (autoencoding MNIST, quadratic error), 100 iterations of SGD, learning rate and variance of the
# initial weights. Open: everything else.
TASK = {
    "data": "mnist",
    "side": 28,
    "cases": 1000,
    "hidden": [100, 30, 100],
    "batch": 20,
    "iterations": 100,
    "lr": [1e-4, 1.0],
    "alpha": [1e-2, 1e2],
}
# For the table 30 000 networks are trained.
SMALLER = {"side": 14, "cases": 500, "hidden": [30, 10, 30], "batch": 10}
DIGITS = {"data": "digits", "side": 8, "cases": 200, "hidden": [12, 4, 12], "iterations": 20}


@recipe(
    "thesis-fig2.2",
    title="cost over learning rate and variance",
    source="[THESIS, fig. 2.2]",
    full=Size(120, {**TASK, "points": 32}),
    quick=Size(2, {**DIGITS, "points": 6}),
)
def figure_2_2(run: Run) -> None:
    """The cost after 100 iterations on a fine grid."""
    task, n = _Task(run), run.configuration["points"]

    def costs() -> dict[str, Any]:
        middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        lr, alpha = torch.meshgrid(
            *(_logarithmic(middles, run.configuration[k]) for k in ("lr", "alpha")), indexing="ij"
        )
        found = task.costs(lr.flatten(), alpha.flatten(), 0)
        run.save("costs", {"lr": lr[:, 0], "alpha": alpha[0], "costs": found.view(n, n)})
        return {"worst allowed": task.worst, "best": found[found.isfinite()].min().item()}

    run.part("costs", costs)


@recipe(
    "thesis-fig4.1",
    title="grid, random and biased random search",
    source="[THESIS, fig. 4.1]",
    full=Size(40, {**TASK, "trials": 100}),
    quick=Size(2, {**DIGITS, "trials": 16}),
)
def figure_4_1(run: Run) -> None:
    """One search of each kind: where it looked, and what it found."""
    task = _Task(run)
    for method in METHODS:

        def search(method: str = method) -> dict[str, Any]:
            (study,) = searches(task, method, [0])
            trials = study.get_trials(deepcopy=False)
            return {"trials": [{**t.params, "cost": t.value} for t in trials], "best": study.best_value}

        run.part(method, search)


@recipe(
    "thesis-table4.1",
    title="100 searches of 100 experiments each",
    source="[THESIS, sec. 4.1, table]",
    full=Size(240, {**TASK, **SMALLER, "trials": 100, "searches": 100, "block": 20}),
    quick=Size(5, {**DIGITS, "batch": 20, "trials": 9, "searches": 6, "block": 3}),
)
def table_4_1(run: Run) -> None:
    """The best cost of each of many searches of each kind."""
    task, c = _Task(run), run.configuration
    for start in range(0, c["searches"], c["block"]):
        numbers = range(start, min(start + c["block"], c["searches"]))
        for method in METHODS:

            def block(method: str = method, numbers: Sequence[int] = numbers) -> dict[str, Any]:
                studies = searches(task, method, numbers)
                failed = [sum(t.value is None for t in s.get_trials(deepcopy=False)) for s in studies]
                return {"best": [s.best_value for s in studies], "failed": failed}

            run.part(f"{method}, searches {numbers[0]} to {numbers[-1]}", block)


class _Task:
    """The data of a run, and costs of networks trained on them.

    Attributes:
        worst: The cost of the output 0, E ‖x‖². What ends above it counts as diverged: numbers that are finite but
            huge would make all others look alike.
    """

    def __init__(self, run: Run) -> None:
        c = self.configuration = run.configuration
        data = labelled.load(c["data"], run.data).take(c["cases"]).resized(c["side"])
        self.seed = run.seed
        self.x = data.x_train.float().to(run.device)
        self.worst = self.x.square().sum(dim=1).mean().item()
        self.space: dict[str, BaseDistribution] = {k: FloatDistribution(*c[k], log=True) for k in ("lr", "alpha")}

    def costs(self, lr: Tensor, alpha: Tensor, stream: int) -> Tensor:
        """Costs of networks with these settings, NaN for diverged ones; other initial weights for every stream."""
        c = self.configuration
        sizes = [self.x.shape[1], *c["hidden"], self.x.shape[1]]
        found = []
        for i, (some, alphas) in enumerate(zip(lr.split(AT_ONCE), alpha.split(AT_ONCE), strict=True)):
            words = np.random.SeedSequence([self.seed, stream, i]).generate_state(1)
            found.append(
                final_costs(
                    self.x,
                    sizes,
                    some.to(self.x),
                    alphas.to(self.x),
                    batch=c["batch"],
                    iterations=c["iterations"],
                    generator=torch.Generator().manual_seed(int(words[0])),
                ).cpu()
            )
        costs = torch.cat(found)
        return torch.where(costs <= self.worst, costs, math.nan)


def searches(task: _Task, method: str, numbers: Sequence[int]) -> list[optuna.Study]:
    """Searches by one method with these numbers, in step: their networks are trained together."""
    trials = task.configuration["trials"]
    with quiet():
        studies = [optuna.create_study(sampler=_sampler(task, method, trials, number)) for number in numbers]
        done = math.prod(len(v) for v in grid(task.space, trials).values()) if method == "grid" else trials
        for t in range(done):
            asked = [study.ask(task.space) for study in studies]
            lr, alpha = (torch.tensor([a.params[k] for a in asked], dtype=torch.float64) for k in ("lr", "alpha"))
            stream = (numbers[0] * trials + t) * len(METHODS) + METHODS.index(method)
            for study, trial, cost in zip(studies, asked, task.costs(lr, alpha, stream).tolist(), strict=True):
                failed = math.isnan(cost)
                study.tell(trial, None if failed else cost, state=optuna.trial.TrialState.FAIL if failed else None)
    return studies


def _sampler(task: _Task, method: str, trials: int, number: int) -> BaseSampler:
    seed = int(np.random.SeedSequence([task.seed, number, METHODS.index(method)]).generate_state(1)[0])
    if method == "grid":
        return Grid(grid(task.space, trials), seed=seed)
    return RandomSampler(seed) if method == "random" else BiasedRandomSampler(seed)


def _logarithmic(u: Tensor, ends: Sequence[float]) -> Tensor:
    """From [0, 1] to between the ends, on a logarithmic scale."""
    low, high = (math.log(end) for end in ends)
    return (low + u * (high - low)).exp()
