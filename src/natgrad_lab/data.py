"""The tasks of the bench: images to compress and restore, with their likelihoods and models.

Pixels of CURVES, the digits and MNIST lie in [0, 1] and are Bernoulli targets; those of FACES are real numbers and
Gaussian targets [KFAC, sec. 13].
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad import Bernoulli, Gaussian
from natgrad_lab import files, generate, models
from natgrad_lab.files import DataError

NAMES = ("curves", "digits", "mnist", "faces")

CURVES_TRAIN, CURVES_TEST = 20_000, 10_000
DIGITS_TRAIN = 1500
PERSONS, PATCHES_PER_FACE = 40, 414
FACES_TRAIN_PERSONS, FACES_TEST_PERSONS = 25, 10  # the first and the last; those between are for validation


@dataclass(frozen=True)
class Task:
    """Data, likelihood and model of a benchmark.

    Attributes:
        name: As on the command line.
        x_train, x_test: Inputs [cases, pixels].
        y_train, y_test: Targets: for autoencoders the same objects as the inputs.
        likelihood: Of the targets given the model's outputs.
        make_model: (seed, activation) to a freshly initialised model on the CPU, in the dtype of the data.
        description: One sentence for reports.
    """

    name: str
    x_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    likelihood: Any
    make_model: Callable[..., nn.Module] = field(repr=False)
    description: str


def load(
    task: str,
    *,
    folder: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    train: int | None = None,
    test: int | None = None,
) -> Task:
    """Load, download or generate the data of a task.

    Args:
        task: "curves" (generated, then cached), "digits" (comes with scikit-learn), "mnist" or "faces" (from the
            files of MNIST or of the Olivetti photographs).
        folder: Where these files are, directly or in `mnist/` or `olivetti/`. If None: the folder that the
            environment variable NATGRAD_DATA names, else scikit-learn downloads them.
        dtype: Of the pixels.
        seed: Of what is random in the data: the curves, the split of the digits, the face patches.
        train: How many training cases at most: evenly spaced ones, since FACES are ordered by person.
        test: The same for the test cases.

    Raises:
        DataError: an unknown task, a size below 1, missing files, a wrong checksum, or a failed download; a
            `ValueError`.
    """
    if task not in NAMES:
        raise DataError(f"unknown task {task!r}; known: {', '.join(NAMES)}")
    for name, size in (("train", train), ("test", test)):
        if size is not None and size < 1:
            raise DataError(f"{name} is {size}; expected a number of cases of at least 1, or None for all")
    place = None if folder is None else Path(folder)
    x_train, x_test, description = _PIXELS[task](place, seed)
    x_train, x_test = (_thin(x, n).to(dtype) for x, n in ((x_train, train), (x_test, test)))
    return Task(
        name=task,
        x_train=x_train,
        x_test=x_test,
        y_train=x_train,
        y_test=x_test,
        likelihood=Gaussian() if task == "faces" else Bernoulli(),
        make_model=partial(_make_model, models.ENCODERS[task], dtype),
        description=description,
    )


def reconstruction_error(likelihood: Any, z: Tensor, x: Tensor) -> Tensor:
    """Mean over cases of sum_j (E[x_j | z] - x_j)², the papers' error of an autoencoder; 0-d, summed in float64."""
    return (likelihood.to_mean(z) - x).square().sum(dtype=torch.float64) / len(x)


def _make_model(
    encoder: tuple[int, ...], dtype: torch.dtype, seed: int = 0, activation: models.Activation = "tanh"
) -> nn.Module:
    return models.autoencoder(encoder, activation=activation, seed=seed).to(dtype)


def _thin(x: Tensor, n: int | None) -> Tensor:
    """At most `n` rows of x, evenly spaced."""
    if n is None or n >= len(x):
        return x
    return x[torch.arange(n) * len(x) // n]


def _curves(folder: Path | None, seed: int) -> tuple[Tensor, Tensor, str]:
    n = CURVES_TRAIN + CURVES_TEST
    pixels = files.cached(f"curves-1-{n}-{seed}", lambda: generate.curves(n, seed)).float() / 255.0
    return (
        pixels[:CURVES_TRAIN],
        pixels[CURVES_TRAIN:],
        "CURVES: generated 28 x 28 images of smooth curves through three random points.",
    )


def _digits(folder: Path | None, seed: int) -> tuple[Tensor, Tensor, str]:
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().data).float() / 16.0
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))]
    return (
        pixels[:DIGITS_TRAIN],
        pixels[DIGITS_TRAIN:],
        "The 8 x 8 images of handwritten digits that come with scikit-learn.",
    )


def _mnist(folder: Path | None, seed: int) -> tuple[Tensor, Tensor, str]:
    description = "MNIST: 28 x 28 images of handwritten digits."
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
    paths = files.find(names, "mnist", folder)
    if paths is not None:
        train, test = (files.read_idx(paths[name]).flatten(1).float() / 255.0 for name in names)
        return train, test, description

    def fetch() -> Tensor:
        from sklearn.datasets import fetch_openml

        pixels = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff").data
        return torch.from_numpy(pixels).float().view(70_000, 784) / 255.0

    pixels = download("MNIST", fetch, names)
    return pixels[:60_000], pixels[60_000:], description


def photographs(folder: Path | None = None) -> Tensor:
    """The Olivetti photographs, float32 [400, 64, 64], ten of each of 40 persons, person by person.

    Args:
        folder: As for `load`.

    Raises:
        DataError: missing or corrupt files, a failed download.
    """
    name = "olivettifaces.mat"
    paths = files.find([name], "olivetti", folder)

    def fetch() -> Tensor:
        from sklearn.datasets import fetch_olivetti_faces

        return torch.from_numpy(fetch_olivetti_faces().images)

    return (
        files.read_faces(paths[name]) if paths is not None else download("the Olivetti faces", fetch, [name])
    ).float()


def _faces(folder: Path | None, seed: int) -> tuple[Tensor, Tensor, str]:
    train, test = split_faces(photographs(folder), PATCHES_PER_FACE, seed)
    description = "FACES: 25 x 25 patches of the Olivetti photographs; the test set shows other persons."
    return train, test, description


def split_faces(faces: Tensor, per_face: int, seed: int) -> tuple[Tensor, Tensor]:
    """Patches of the first 25 and of the last 10 of 40 persons.

    Each pixel is shifted to mean 0 over the training patches, then all are divided by one number, so that the average
    variance of the training pixels is 1.
    """
    patches = generate.face_patches(faces, per_face, seed)
    person = len(patches) // PERSONS
    train, test = patches[: FACES_TRAIN_PERSONS * person], patches[-FACES_TEST_PERSONS * person :]
    mean = train.mean(dim=0)
    scale = (train - mean).square().mean().sqrt()
    return (train - mean) / scale, (test - mean) / scale


def download(what: str, fetch: Callable[[], Any], names: Sequence[str]) -> Any:
    """What scikit-learn downloads, or an error that says how to do without.

    Args:
        what: As the error names it.
        fetch: Downloads it.
        names: Of the files that would do instead.

    Raises:
        DataError: it could not be downloaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's about each attempt; the error below says it once
            return fetch()
    except Exception as error:  # of the network, the server, the disk or a file that came only in part
        raise DataError(
            f"{what} could not be downloaded ({type(error).__name__}: {error}); without a network, put "
            f"{' and '.join(names)} into a folder and name it with --data FOLDER or in the environment variable "
            "NATGRAD_DATA"
        ) from error


_PIXELS: dict[str, Callable[[Path | None, int], tuple[Tensor, Tensor, str]]] = {
    "curves": _curves,
    "digits": _digits,
    "mnist": _mnist,
    "faces": _faces,
}
