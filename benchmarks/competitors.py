"""Preconditioned steps of other K-FAC libraries beside natgrad's, everything renewed at every step.

What is installed is measured (`pip install -e .[bench]`), what is not is named. Random data, float32, CPU-seconds of
one thread: the least of a few measurements of each, taken in turn.
"""

import argparse
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.measure import cpu_seconds, positive, say
from benchmarks.report import save, table

DAMPING = 1e-2
Step = Callable[[], Any]
Maker = Callable[[nn.Module, Tensor, Tensor], Step]


def cnn(width: int) -> nn.Module:
    """Three stages of 3 x 3 convolutions with biases; no normalisation, which most of the libraries do not cover."""
    layers: list[nn.Module] = []
    before = 3
    for stage in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(before, stage, 3, 2 if before > 3 else 1, 1), nn.ReLU()]
        layers += [nn.Conv2d(stage, stage, 3, 1, 1), nn.ReLU()]
        before = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def mlp(width: int) -> nn.Module:
    """784 inputs, three hidden layers, 10 classes."""
    sizes = (784, width, width, width, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """SGD alone."""
    optimizer, loss = _sgd(model), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def natgrad(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Sampled targets, the same forward pass for statistics and loss."""
    optimizer, likelihood = _sgd(model), ng.Categorical()
    pre = ng.Preconditioner(model, likelihood, damping=DAMPING, periods=ng.Renewal(1, (), 1))

    def step() -> None:
        optimizer.zero_grad()
        z = model(x)
        pre.observe(z)
        likelihood.nll(z, y).backward()
        pre.step()
        optimizer.step()

    return step


def curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One sampled target, weight and bias joint, damping with the trace-norm π."""
    library = importlib.import_module("curvlinops")
    optimizer, loss = _sgd(model), nn.CrossEntropyLoss()
    parameters = list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        how = {"mc_samples": 1, "separate_weight_and_bias": False, "check_deterministic": False}
        kfac = library.KFACLinearOperator(model, loss, parameters, [(x, y)], **how)
        inverse = library.KFACInverseLinearOperator(kfac, damping=DAMPING, use_heuristic_damping=True)
        for p, update in zip(parameters, inverse @ [p.grad for p in parameters], strict=True):
            p.grad = update
        optimizer.step()

    return step


def nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One sampled target, inverses of both factors."""
    metrics = importlib.import_module("nngeometry.metrics")
    objects = importlib.import_module("nngeometry.object")
    optimizer, loss = _sgd(model), nn.CrossEntropyLoss()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        fisher = metrics.FIM_MonteCarlo(model, batches, objects.PMatKFAC, trials=1)
        gradient = objects.PVector.from_model_grad(model)
        updates = fisher.inverse(DAMPING).mv(gradient).to_torch().split([p.numel() for p in model.parameters()])
        for p, update in zip(model.parameters(), updates, strict=True):
            p.grad = update.view_as(p)
        optimizer.step()

    return step


def asdl(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One sampled target, the same forward pass for statistics and loss."""
    library = importlib.import_module("asdl.precondition")
    optimizer, loss = _sgd(model), nn.CrossEntropyLoss()
    maker = library.KfacGradientMaker(model, library.PreconditioningConfig(data_size=len(x), damping=DAMPING))

    def step() -> None:
        optimizer.zero_grad()
        z = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, z, y)
        maker.forward_and_backward()
        optimizer.step()

    return step


def singd(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The empirical Fisher matrix, whose statistics need no backward pass of their own, and no inverses."""
    library = importlib.import_module("singd.optim.optimizer")
    loss = nn.CrossEntropyLoss()
    optimizer = library.SINGD(model, lr=1e-3, momentum=0.9, damping=DAMPING, T=1, lr_cov=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


# Name in the table → (name in the package index, how a step is made, what it renews at every step).
LIBRARIES: dict[str, tuple[str, Maker, str]] = {
    "natgrad": ("natgrad", natgrad, "sampled, Cholesky"),
    "curvlinops": ("curvlinops-for-pytorch", curvlinops, "sampled, Cholesky"),
    "nngeometry": ("nngeometry", nngeometry, "sampled, LU"),
    "ASDL": ("asdfghjkl", asdl, "sampled, Cholesky"),
    "singd": ("singd", singd, "empirical, no inverses"),
}


def version(package: str) -> str | None:
    """That is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, count: int, rounds: int = 3
) -> tuple[dict[str, float], dict[str, str]]:
    """CPU-seconds of a step by library, SGD's as ``""``; and what failed, with its message."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name, (package, maker, _) in {"": ("torch", plain, ""), **LIBRARIES}.items():
        if version(package) is None:
            continue
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                steps[name] = maker(make(), x, y)
                steps[name]()  # everything is made
        except Exception as problem:  # somebody else's library, some other version of torch
            failed[name] = f"{type(problem).__name__}: {problem}"
            steps.pop(name, None)
            say(f"competitors: {name} failed: {failed[name]}")
    seconds = dict.fromkeys(steps, float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            for name, step in steps.items():
                taken = cpu_seconds(lambda step=step: [step() for _ in range(count)]) / count
                seconds[name] = min(seconds[name], taken)
    return seconds, failed


def step_table(found: dict[str, dict[str, float]], failed: dict[str, dict[str, str]]) -> str:
    """Multiples of a step of SGD alone; a dash for what is not installed or failed."""
    rows = [
        [
            f"{name} {version(package) or '(not installed)'}",
            renewed,
            *(found[model].get(name, float("nan")) / found[model][""] for model in found),
        ]
        for name, (package, _, renewed) in LIBRARIES.items()
    ]
    lines = table(["", "renewed at every step", *found], rows)
    problems = sorted({f"{name} on the {model}: {text}" for model, x in failed.items() for name, text in x.items()})
    return lines + "".join(f"\n\nFailed: {problem}" for problem in problems)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive(int), default=16, help="channels of the CNN (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive(int), default=128, help="examples (default: %(default)s)")
    parser.add_argument("--steps", type=positive(int), default=10, help="of each turn (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    batch, width = options.batch_size, options.width
    y = torch.arange(batch) % 10
    tasks = {
        "CNN": (lambda: cnn(width), torch.randn(batch, 3, 32, 32)),
        "MLP": (lambda: mlp(16 * width), torch.randn(batch, 784)),
    }
    found, failed = {}, {}
    for name, (make, x) in tasks.items():
        found[name], failed[name] = measure(make, x, y, options.steps)
    versions = {name: version(package) for name, (package, _, _) in LIBRARIES.items()}
    settings = {"width": width, "batch_size": batch, "steps": options.steps, "versions": versions}
    save(
        "competitors",
        "Other libraries, everything renewed at every step",
        [
            f"A training step with factors and inverses renewed at every one of them, in units of a step of SGD alone: "
            f"a CNN of {width} to {4 * width} channels on 32 x 32 images, an MLP 784-{16 * width}-{16 * width}-"
            f"{16 * width}-10; {batch} examples, the best of 3 turns of {options.steps} steps. Convolutions in "
            '"expand", dense factors, damping 0.01. natgrad, curvlinops, nngeometry and ASDL draw one target from the '
            "model; singd's factors are those of the empirical Fisher matrix, which its own loss gives it for nothing. "
            "natgrad, curvlinops and ASDL split the damping between the factors by their traces. natgrad also averages "
            "factors over the steps (as singd does), leaves out what is not finite and bounds the step; its inverses "
            "serve one step here: it solves with a Cholesky factor where that is cheaper than to write an inverse out.",
            step_table(found, failed),
        ],
        {"settings": settings, "seconds": found, "failed": failed},
        command=options.command,
        folder=options.out,
    )
