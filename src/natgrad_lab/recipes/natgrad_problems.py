"""The three problems of [NATGRAD, table 1]: few digits, all digits, and faces (of another set than the paper's)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad_lab import data, labelled
from natgrad_lab.recipes.natgrad_training import Problem, glorot_
from natgrad_lab.recipes.run import Run

DIGITS, PERSONS, PER_PERSON = 10, data.PERSONS, 10


def restricted(run: Run) -> Problem:
    """The first "cases" digits with their classes, the other training digits without; one layer of hidden units."""
    c = run.configuration
    images = labelled.load(c["data"], run.data).resized(c["side"]).to(device=run.device)
    n, x = c["cases"], images.x_train
    sizes = [c["side"] ** 2, *c["hidden"], DIGITS]
    given = images.take(n, c["test cases"])
    return Problem(
        lambda seed: glorot_(_mlp(sizes), seed).to(x), given.x_train, given.y_train, given.x_test, given.y_test, x[n:]
    )


def digits(run: Run) -> Problem:
    """The first "cases" digits; two convolutional layers, then hidden units."""
    c = run.configuration
    given = labelled.load(c["data"], run.data).resized(c["side"]).to(device=run.device).take(c["cases"])

    def make_model(seed: int) -> nn.Module:
        return glorot_(convolutional(c["side"], c["filters"], c["hidden"], DIGITS), seed).to(given.x_train)

    return Problem(make_model, given.x_train, given.y_train, given.x_test, given.y_test)


def faces(run: Run, split: int) -> Problem:
    """Who is it? Of each person's ten photographs some with, some without name for training, the others for testing.

    Pixels are shifted and scaled to mean 0 and variance 1 over the training photographs.

    Args:
        run: Its configuration has "side", and "given" and "unlabelled", numbers of photographs of a person. If "data"
            is "digits": those instead, as if each class were a person.
        split: Which division of the photographs.
    """
    c = run.configuration
    if c["data"] == "faces":
        images = data.photographs(run.data).view(PERSONS, PER_PERSON, 1, 64, 64)
        images = nn.functional.interpolate(images.flatten(0, 1), size=(c["side"],) * 2, mode="area")
        images = images.view(PERSONS, PER_PERSON, -1)
    else:
        every = labelled.load("digits").resized(c["side"])
        images = torch.stack([every.x_train[every.y_train == k][: 3 * PER_PERSON] for k in range(DIGITS)])
    classes, each = images.shape[:2]
    generator = torch.Generator().manual_seed(split)
    order = torch.stack([torch.randperm(each, generator=generator) for _ in range(classes)])
    shuffled = images.take_along_dim(order[..., None], 1).to(run.device)
    parts = shuffled.split([c["given"], c["unlabelled"], each - c["given"] - c["unlabelled"]], 1)
    known = torch.cat(parts[:2], 1)
    mean, scale = known.mean(), known.std()
    x_train, unlabelled, x_test = (((part - mean) / scale).flatten(0, 1) for part in parts)

    def named(x: Tensor) -> Tensor:
        return torch.arange(classes, device=x.device).repeat_interleave(len(x) // classes)

    def make_model(seed: int) -> nn.Module:
        return glorot_(convolutional(c["side"], c["filters"], c["hidden"], classes), seed).to(x_train)

    return Problem(make_model, x_train, named(x_train), x_test, named(x_test), unlabelled)


def convolutional(side: int, filters: Sequence[Sequence[int]], hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Convolutions (each [filters, size, stride]) and then linear layers, with rectifiers between them all."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
    channels = 1
    for count, size, stride in filters:
        layers += [nn.Conv2d(channels, count, size, stride), nn.ReLU()]
        side, channels = (side - size) // stride + 1, count
    return nn.Sequential(*layers, nn.Flatten(), *_mlp([channels * side**2, *hidden, classes]))


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(1, len(sizes)):
        layers += [nn.Linear(sizes[i - 1], sizes[i]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
