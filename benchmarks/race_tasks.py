"""The networks and the text or images of the races: those of the examples, so that a user can repeat a race."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.measure import ROOT

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RaceTask:
    """What is trained.

    Attributes:
        name: of the command.
        about: sizes, in words.
        likelihood: its ``nll`` is the loss.
        make_model: from a seed.
        batches: endless, from a seed.
        evaluate: validation loss of a model.
        steps: of the run that sets the target.
    """

    name: str
    about: str
    likelihood: Any
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[nn.Module], float]
    steps: int


def example(name: str) -> ModuleType:
    """A script of the folder ``examples``."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def transformer(width: int = 64, layers: int = 2, context: int = 64, batch: int = 32, steps: int = 300) -> RaceTask:
    """A character transformer on Tiny Shakespeare."""
    script = example("char_transformer")
    text = script.load()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield text.windows(text.train, context, batch, generator)

    return RaceTask(
        "transformer",
        f"{layers} blocks of width {width}, {batch} windows of {context} characters a step, {text.name}",
        ng.Categorical("element"),
        lambda seed: script.make_model(len(text.characters), context, width, layers, seed),
        batches,
        lambda model: script.evaluate(model, text, context),
        steps,
    )


def cnn(width: int = 8, blocks: int = 1, batch: int = 64, steps: int = 120) -> RaceTask:
    """A residual network with batch normalisation on a part of CIFAR-10."""
    script = example("image_classifier")
    images = script.load()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        while True:
            if len(order) < batch:
                order = torch.randperm(len(images.x_train), generator=generator)
            rows, order = order[:batch], order[batch:]
            yield script.augmented(images.x_train[rows], generator), images.y_train[rows]

    depth = 6 * blocks + 2
    return RaceTask(
        "cnn",
        f"a residual network of {depth} layers, {width} to {4 * width} channels, batch normalisation, {batch} images a "
        f"step, shifted and mirrored, {images.name}: {len(images.x_train)} images for training, "
        f"{len(images.x_test)} for validation",
        ng.Categorical(),
        lambda seed: script.make_model(images.x_train.shape[1], width, blocks, seed),
        batches,
        lambda model: script.evaluate(model, images.x_test, images.y_test)[0],
        steps,
    )


TASKS: dict[str, Callable[..., RaceTask]] = {"transformer": transformer, "cnn": cnn}


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 1, as a share: up over the first twentieth, then half a cosine."""
    warmup = max(1, steps // 20)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))
