"""The experiments of [KFAC, secs. 6.4, 13]: figures 7, 9, 10 and 11. Stopped runs go on."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

import natgrad as ng
from natgrad_lab.recipes.base import Size, recipe
from natgrad_lab.recipes.kfac_training import load_task, session, train
from natgrad_lab.recipes.run import Run

MINUTE = 60.0
DIAGONAL = {"optimizer": "kfac-paper", "structure": "block_diagonal"}
TRIDIAGONAL = {"optimizer": "kfac-paper", "structure": "block_tridiagonal"}
# η as in sec. 13. The paper names no activation; λ₀ = 150 and the rest are those of KFAC.paper.
COMMON = {"l2": 1e-5, "activation": "tanh", "cases": None, "seconds": None}
SMALL = {"cases": 300, "updates": 12}


@recipe(
    "kfac-fig7",
    title="improvement against γ, Δ scaled and not",
    source="[KFAC, fig. 7]",
    full=Size(
        10 * MINUTE,
        {
            **COMMON,
            "task": "mnist",
            # The paper's network is that of iteration 500, its batches grow to all 60 000 cases by then.
            "updates": 200,
            "method": {**TRIDIAGONAL, "m": 1000},
            "structures": ["block_tridiagonal", "block_diagonal"],
            "rows": 2000,
            "gammas": [10.0 ** (k / 2) for k in range(-6, 4)],
        },
    ),
    quick=Size(
        5,
        {
            **SMALL,
            "task": "digits",
            "method": {"optimizer": "kfac", "structure": "block_tridiagonal", "m": None},
            "rows": 200,
            "gammas": [10.0**k for k in range(-3, 3)],
        },
    ),
)
def figure_7(run: Run) -> None:
    """One more update of a partly trained network: h(θ) − h(θ + δ) for Δ, α Δ and α Δ + μ δ₀, and many γ."""
    c = run.configuration
    task = load_task(run, c["task"])

    def trained() -> dict[str, Any]:
        states = []
        for updates in (c["updates"] - 1, c["updates"]):  # their difference is δ₀
            training = session(run, task, "network", c["method"], updates)
            done = training.runner.update
            with run.bar(f"training to update {updates}", updates) as advance:
                for _ in range(done):
                    advance()
                result = training.run(updated=lambda runner: advance())  # noqa: B023 - called within this iteration
            if result.reason == "interrupted":
                raise KeyboardInterrupt
            if result.reason == "diverged":
                raise RuntimeError(f"{c['method']['optimizer']} diverged: {result.message}; try another --seed")
            states.append(_vector(training.runner.competitor.model))
        statistics = dict(cast(ng.KFAC, training.runner.competitor.optimizer).stats)
        run.save("network", {"before": states[0], "after": states[1]})
        return {key: float(statistics[key]) for key in ("lambda", "gamma", "rho")}

    found = run.part("training", trained)
    saved = run.load("network")
    assert saved is not None  # the part above wrote it
    model = task.make_model(seed=run.seed, activation=c["activation"]).to(run.device)
    torch.nn.utils.vector_to_parameters(saved["after"].to(run.device), model.parameters())
    previous = (saved["after"] - saved["before"]).to(run.device)
    x = task.x_train[: c["rows"]]
    damping = found["lambda"] + c["l2"]
    for structure in c["structures"]:
        run.part(structure, lambda s=structure: _improvements(run, model, task.likelihood, x, s, previous, damping))


def _improvements(
    run: Run, model: torch.nn.Module, likelihood: Any, x: Tensor, structure: str, previous: Tensor, damping: float
) -> dict[str, Any]:
    """The improvement for every γ, all on the same cases; M has the damping λ + η."""
    l2, theta = run.configuration["l2"], _vector(model)
    generator = torch.Generator(device=x.device).manual_seed(run.seed)
    curvature = ng.kronecker_fisher(
        model, likelihood, x, structure=structure, expectation="sampled", generator=generator
    )
    F = ng.Fisher(model, likelihood, x)

    def h(at: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(at, model.parameters())
        with torch.no_grad():
            value = likelihood.nll(model(x), x) + 0.5 * l2 * at.square().sum()
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        return value

    loss = likelihood.nll(model(x), x)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    gradient = torch.cat([g.reshape(-1) for g in gradients]) + l2 * theta
    start = h(theta)
    curves: dict[str, list[float]] = {"Δ": [], "α Δ": [], "α Δ + μ δ₀": []}
    with run.bar(f"γ, {structure}", len(run.configuration["gammas"])) as advance:
        for gamma in run.configuration["gammas"]:
            delta = -(curvature.inverse(gamma**2, kind="factored") @ gradient)
            curves["Δ"].append((start - h(theta + delta)).item())
            for name, directions in (("α Δ", [delta]), ("α Δ + μ δ₀", [delta, previous])):
                step = best_step_within(F, gradient, directions, damping)
                curves[name].append((start - h(theta + step)).item())
            advance()
    return curves


def best_step_within(F: Any, gradient: Tensor, directions: list[Tensor], damping: float) -> Float[Tensor, " size"]:
    """The minimiser of M in the span of the directions [KFAC, secs. 6.4, 7]."""
    D = torch.stack(directions, dim=1)
    quadratic = D.mT @ (F @ D) + damping * D.mT @ D
    coefficients = torch.linalg.solve(quadratic.double(), -(D.mT @ gradient).double())
    return D @ coefficients.to(D)


def _vector(model: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# The library's defaults: from λ₀ = 150 the published ones spend a hundred updates on λ alone, whatever m is.
PLAIN = {"whole inverses": True, "one alpha": True}
FIXED = {"optimizer": "kfac", **PLAIN}
FIXED_SIZE = {
    "block-tridiagonal": {**FIXED, "optimizer": "kfac-tridiagonal"},
    "block-diagonal": FIXED,
    "block-diagonal, no momentum": {**FIXED, "momentum": False},
    "baseline": {"optimizer": "nesterov"},
}


@recipe(
    "kfac-fig9",
    title="mini-batch size against progress",
    source="[KFAC, fig. 9]",
    full=Size(
        6 * MINUTE,
        {
            **COMMON,
            "task": "mnist",
            "methods": FIXED_SIZE,
            "sizes": dict.fromkeys(FIXED_SIZE, [200, 600, 1800]) | {"baseline": [64, 192, 576]},
            "updates": dict.fromkeys(FIXED_SIZE, 50) | {"baseline": 200},
        },
    ),
    quick=Size(
        5,
        {
            "task": "digits",
            "cases": 300,
            "sizes": dict.fromkeys(FIXED_SIZE, [50, 200]),
            "updates": dict.fromkeys(FIXED_SIZE, 12) | {"baseline": 40},
        },
    ),
)
def figure_9(run: Run) -> None:
    """The same task with fixed batch sizes: error per iteration and per training case."""
    c = run.configuration
    task = load_task(run, c["task"])
    for name, method in c["methods"].items():
        for m in c["sizes"][name]:
            part, updates = f"{name}, m = {m}", c["updates"][name]
            run.part(part, lambda p=part, how=method, u=updates, m=m: train(run, task, p, {**how, "m": m}, u))


# By the names of the paper's legend. m = None: the batch size grows to the whole training set at update 500 (400 with
# the defaults); the baseline's is fixed and tuned.
METHODS = {
    "Blk-TriDiag K-FAC": {**TRIDIAGONAL, "m": None},
    "Blk-Diag K-FAC": {**DIAGONAL, "m": None},
    "Blk-TriDiag K-FAC (no moment.)": {**TRIDIAGONAL, "momentum": False, "m": 1000},
    "Blk-Diag K-FAC (no moment.)": {**DIAGONAL, "momentum": False, "m": 1000},
    "baseline": {"optimizer": "nesterov", "m": None},
    "natgrad's K-FAC": {"optimizer": "kfac", "m": None},
    # No low rank and no coefficients of layers, which the block-tridiagonal structure does not have: the structures
    # alone differ.
    "defaults, block-tridiagonal": {"optimizer": "kfac-tridiagonal", "m": None, **PLAIN},
    "defaults, block-diagonal": {"optimizer": "kfac", "m": None, **PLAIN},
}
COMPARED = {
    "published constants": ["Blk-TriDiag K-FAC", "Blk-Diag K-FAC"],
    "defaults": ["defaults, block-tridiagonal", "defaults, block-diagonal"],
}
CURVES = {
    **COMMON,
    "task": "curves",
    "methods": METHODS,
    "updates": {
        "Blk-TriDiag K-FAC": 500,
        "Blk-Diag K-FAC": 500,
        "Blk-TriDiag K-FAC (no moment.)": 500,
        "Blk-Diag K-FAC (no moment.)": 500,
        "baseline": 5000,
        "natgrad's K-FAC": 100,
        "defaults, block-tridiagonal": 100,
        "defaults, block-diagonal": 100,
    },
    "compared": COMPARED,  # N_tri and N_diag
    "seeds": {name: [0, 1, 2] if name in COMPARED["defaults"] else [0] for name in METHODS},
}
ONE_SEED = {**CURVES, "seeds": {name: [0] for name in METHODS}}
# A block-tridiagonal run may be shorter: it is compared at errors that both reach.
MNIST = {
    **ONE_SEED,
    "task": "mnist",
    "updates": {
        "Blk-TriDiag K-FAC": 140,
        "Blk-Diag K-FAC": 200,
        "Blk-TriDiag K-FAC (no moment.)": 120,
        "Blk-Diag K-FAC (no moment.)": 120,
        "baseline": 4000,
        "natgrad's K-FAC": 100,
        "defaults, block-tridiagonal": 70,
        "defaults, block-diagonal": 100,
    },
}
# An inversion of its factors takes seconds: of the published constants the block-diagonal structure alone.
OF_FACES = (
    "Blk-Diag K-FAC",
    "Blk-Diag K-FAC (no moment.)",
    "baseline",
    "natgrad's K-FAC",
    *COMPARED["defaults"],
)
FACES = {
    **ONE_SEED,
    "task": "faces",
    "methods": {name: METHODS[name] for name in OF_FACES},
    "updates": {
        "Blk-Diag K-FAC": 100,
        "Blk-Diag K-FAC (no moment.)": 100,
        "baseline": 3000,
        "natgrad's K-FAC": 80,
        "defaults, block-tridiagonal": 60,
        "defaults, block-diagonal": 80,
    },
    "compared": {"defaults": COMPARED["defaults"]},
    "seeds": {name: [0] for name in OF_FACES},
}
FEW = {**SMALL, "updates": {name: 40 if name == "baseline" else 12 for name in METHODS}}


@recipe(
    "kfac-fig10",
    title="CURVES: error by time, by iteration (10, 11)",
    source="[KFAC, figs. 10, 11]",
    full=Size(26 * MINUTE, CURVES),
    quick=Size(5, {**FEW, "task": "digits"}),
)
def figure_10(run: Run) -> None:
    """Every method on a task: error against seconds and against iterations."""
    c = run.configuration
    task = load_task(run, c["task"])
    runs = sorted((seed, name) for name, seeds in c["seeds"].items() for seed in seeds)
    for seed, name in runs:
        part, how, updates = f"{name}, seed {seed}", c["methods"][name], c["updates"][name]
        run.part(part, lambda p=part, how=how, u=updates, s=seed: train(run, task, p, how, u, seed=run.seed + s))


@recipe(
    "kfac-fig10-mnist",
    title="MNIST: error by time, by iteration (10, 11)",
    source="[KFAC, figs. 10, 11]",
    full=Size(17 * MINUTE, MNIST),
    quick=Size(5, {**FEW, "task": "digits"}),
)
def figure_10_mnist(run: Run) -> None:
    """The same on MNIST."""
    figure_10.compute(run)


@recipe(
    "kfac-fig10-faces",
    title="FACES: error by time, by iteration (10, 11)",
    source="[KFAC, figs. 10, 11]",
    full=Size(18 * MINUTE, FACES),
    quick=Size(5, {**FEW, "task": "digits"}),
)
def figure_10_faces(run: Run) -> None:
    """The same on FACES."""
    figure_10.compute(run)
