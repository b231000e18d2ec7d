"""The data sets: what is generated, what is read, and what bad files and missing networks get."""

import gzip
import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from natgrad import Bernoulli, Gaussian
from natgrad_lab import data, files, generate, labelled


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NATGRAD_DATA", raising=False)


# CURVES


def test_spline_is_the_natural_one() -> None:
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.uniform(2, 9, (5, 3)), axis=1)
    y = rng.uniform(2, 26, (5, 3))
    t = x[:, :1] + (x[:, 2:] - x[:, :1]) * np.linspace(0, 1, 50)
    expected = np.stack([CubicSpline(a, b, bc_type="natural")(c) for a, b, c in zip(x, y, t, strict=True)])
    got = generate.natural_spline(*(torch.from_numpy(v) for v in (x, y, t)))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11)


def by_hand(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One image, point by point and pixel by pixel, before clipping."""
    t = np.linspace(x[0], x[2], 400)
    height = np.clip(CubicSpline(x, y, bc_type="natural")(t), 0, 27)
    length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(t), np.diff(height)))])
    image = np.zeros((30, 30))
    for s in np.linspace(0, length[-1], 60):
        px, py = np.interp(s, length, t), np.interp(s, length, height)
        for row in range(28):
            for column in range(28):
                image[row + 1, column + 1] += 0.74 * max(0, 1 - abs(px - column)) * max(0, 1 - abs(py - row))
    a = 0.7
    for _ in range(2):
        spread = np.zeros((30, 30))
        for r in range(1, 29):
            for c in range(1, 29):
                window = image[r - 1 : r + 2, c - 1 : c + 2]
                corners = window[0, 0] + window[0, 2] + window[2, 0] + window[2, 2]
                edges = window[0, 1] + window[1, 0] + window[1, 2] + window[2, 1]
                spread[r, c] = (1 - a) * window[1, 1] + a / 6 * edges + a / 12 * corners
        image = spread
    return image[1:-1, 1:-1]


def test_curves_equal_a_plain_loop() -> None:
    images = generate.curves(3, seed=5).view(3, 28, 28).numpy()
    draws = np.random.default_rng(5).random((3, 6))
    for image, draw in zip(images, draws, strict=True):
        x = 2 + 20 * np.sort(draw[:3]) + [0, 2, 4]
        y = 2 + 24 * draw[3:]
        expected = np.minimum(by_hand(x, y), 1) * 255
        assert np.abs(image - expected).max() <= 0.51


def test_curves_have_the_published_statistics() -> None:
    pixels = generate.curves(4000, seed=0).double() / 255
    train, test = pixels[:3000], pixels[3000:]
    distance = (test - train.mean(0)).square().sum(1).mean()
    assert float(distance) == pytest.approx(17.2, abs=0.5)  # published: 16 to 18
    axes = torch.linalg.svd(train - train.mean(0), full_matrices=False)[2][:18]
    rest = (test - train.mean(0)) @ (torch.eye(784, dtype=torch.float64) - axes.T @ axes)
    assert float(rest.square().sum(1).mean()) == pytest.approx(6.3, abs=0.3)  # published: 5.90
    assert pixels.max() == 1.0 and pixels.min() == 0.0


def test_curves_are_seeded_and_their_beginning_does_not_depend_on_their_number() -> None:
    before = torch.get_rng_state()
    few, many, other = generate.curves(5, 1), generate.curves(2003, 1), generate.curves(5, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(few, many[:5]) and not torch.equal(few, other)
    assert generate.curves(0).shape == (0, 784)
    with pytest.raises(ValueError, match="n is -1"):
        generate.curves(-1)


# The cache


def test_cache_is_used_and_mended(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.arange(6000, dtype=torch.uint8).view(2, 3000)

    for _ in range(2):
        assert torch.equal(files.cached("thing", make), make())
        made.pop()
    assert len(made) == 1  # the second call read it
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    digest = np.array("0" * 64)
    for spoiled in (b"", whole[:100], whole[: len(whole) // 2], b"x" * 50, whole.replace(b"data.npy", b"date.npy")):
        path.write_bytes(spoiled)
        made.clear()
        assert torch.equal(files.cached("thing", make)[1, :3], torch.tensor([184, 185, 186], dtype=torch.uint8))
        assert len(made) == 1 and path.read_bytes()[:4] == b"PK\x03\x04"
    np.savez_compressed(path, data=np.zeros((2, 3000), np.uint8), sha256=digest)  # readable, but not what it says
    made.clear()
    assert files.cached("thing", make).sum() > 0 and len(made) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thing.npz"]


def test_cache_that_cannot_be_written_costs_only_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "file" / "cache"))
    assert torch.equal(files.cached("thing", lambda: torch.ones(3)), torch.ones(3))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert files.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NATGRAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert files.cache_folder() == Path("/somewhere/natgrad")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == Path.home() / ".cache" / "natgrad"


# Tasks


def test_curves_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CURVES_TRAIN", 60)
    monkeypatch.setattr(data, "CURVES_TEST", 30)
    task = data.load("curves", seed=2)
    assert task.x_train.shape == (60, 784) and task.x_test.shape == (30, 784)
    assert task.x_train.dtype == torch.float32
    assert task.y_train is task.x_train and task.y_test is task.x_test
    assert isinstance(task.likelihood, Bernoulli)
    assert torch.equal(torch.cat([task.x_train, task.x_test]) * 255, generate.curves(90, 2).float())
    again = data.load("curves", seed=2, dtype=torch.float64, train=7, test=1)
    assert torch.equal(again.x_train, task.x_train[[0, 8, 17, 25, 34, 42, 51]].double())
    assert again.x_test.shape == (1, 784)
    model = again.make_model(seed=0, activation="sigmoid")
    assert model(again.x_train).dtype == torch.float64


def test_digits_task() -> None:
    task = data.load("digits")
    assert task.x_train.shape == (1500, 64) and task.x_test.shape == (297, 64)
    pixels = torch.cat([task.x_train, task.x_test])
    assert pixels.min() == 0.0 and pixels.max() == 1.0
    assert float(16 * pixels.double().mean()) == pytest.approx(4.884165, abs=1e-6)
    assert float((task.x_test - task.x_train.mean(0)).square().sum(1).mean()) == pytest.approx(4.7, abs=0.2)
    z = task.make_model(seed=0)(task.x_train)
    assert z.shape == (1500, 64) and 64 * 0.5 < float(task.likelihood.nll(z.detach(), task.x_train)) < 64 * 1.0


def test_mnist_task(data_folder: Path) -> None:
    if not (data_folder / "mnist").is_dir():
        pytest.skip(f"no MNIST in {data_folder}")
    task = data.load("mnist", folder=data_folder)
    assert task.x_train.shape == (60000, 784) and task.x_test.shape == (10000, 784)
    assert float(task.x_train.double().mean()) == pytest.approx(0.1306605, abs=1e-6)
    assert float(task.x_train.double().std()) == pytest.approx(0.3081078, abs=1e-6)
    assert task.x_train.max() == 1.0 and isinstance(task.likelihood, Bernoulli)
    directly = data.load("mnist", folder=data_folder / "mnist", test=10)
    assert torch.equal(directly.x_test, task.x_test[::1000])


def test_mnist_from_the_folder_in_the_environment(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (data_folder / "mnist").is_dir():
        pytest.skip(f"no MNIST in {data_folder}")
    monkeypatch.setenv("NATGRAD_DATA", str(data_folder))
    assert data.load("mnist", train=10, test=10).x_train.shape == (10, 784)


def test_faces_are_upright_photographs(data_folder: Path) -> None:
    path = data_folder / "olivetti" / "olivettifaces.mat"
    if not path.is_file():
        pytest.skip(f"no Olivetti faces in {data_folder}")
    faces = files.read_faces(path)
    assert faces.shape == (400, 64, 64) and faces.dtype == torch.uint8 and int(faces.max()) == 242
    assert float(faces.double().mean()) == pytest.approx(132.384, abs=1e-3)
    columns = faces.double().mean(0)
    # Faces are nearly symmetric from left to right, not from top to bottom.
    assert (columns - columns.flip(1)).abs().mean() < 0.5 * (columns - columns.flip(0)).abs().mean()


def test_faces_task(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (data_folder / "olivetti").is_dir():
        pytest.skip(f"no Olivetti faces in {data_folder}")
    monkeypatch.setattr(data, "PATCHES_PER_FACE", 12)
    task = data.load("faces", folder=data_folder)
    assert task.x_train.shape == (25 * 10 * 12, 625) and task.x_test.shape == (10 * 10 * 12, 625)
    assert isinstance(task.likelihood, Gaussian)
    assert float(task.x_train.mean(0).abs().max()) < 1e-5
    assert float(task.x_train.square().mean()) == pytest.approx(1.0, abs=1e-5)
    assert data.PERSONS * 10 * 414 // data.PERSONS * data.FACES_TRAIN_PERSONS == 103_500


def test_patches_of_a_plane_are_planes() -> None:
    """Bilinear interpolation of 3x + 2y + 5 is exact: each patch is the plane turned, scaled and shifted."""
    row, column = torch.meshgrid(*(torch.arange(64, dtype=torch.float64),) * 2, indexing="ij")
    patches = generate.face_patches((3 * column + 2 * row + 5)[None], 40, seed=1).view(40, 25, 25)
    right, down = patches.diff(dim=2), patches.diff(dim=1)
    for d in (right, down):
        torch.testing.assert_close(d, d[:, :1, :1].expand_as(d), rtol=0, atol=1e-9)
    right, down = right[:, 0, 0], down[:, 0, 0]
    scale = ((right.square() + down.square()) / 13).sqrt()  # |(3, 2)|² = 13; a rotation preserves it
    angle = torch.atan2(torch.tensor(2.0), torch.tensor(3.0)) - torch.atan2(down, right)
    angle = torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
    assert 1.4 <= float(scale.min()) < 1.45 and 1.75 < float(scale.max()) <= 1.8
    assert -torch.pi / 2 <= float(angle.min()) < -1.3 and 1.3 < float(angle.max()) <= torch.pi / 2
    with pytest.raises(ValueError, match="faces are 40 x 64 pixels; patches need at least 63"):
        generate.face_patches(torch.zeros(1, 40, 64), 1)


def test_reconstruction_error() -> None:
    z, x = torch.tensor([[0.0, 100.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    assert float(data.reconstruction_error(Bernoulli(), z, x)) == pytest.approx((0.25 + 1.0 + 0.25) / 2)
    assert float(data.reconstruction_error(Gaussian(), z, x)) == pytest.approx((1.0 + 1e4 + 0.25) / 2)


# What bad input gets


def test_refuses_unknown_tasks_and_sizes() -> None:
    with pytest.raises(ValueError, match="unknown task 'cifar'; known: curves, digits, mnist, faces"):
        data.load("cifar")
    with pytest.raises(ValueError, match="train is 0; expected a number of cases of at least 1"):
        data.load("digits", train=0)


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no t10k-images-idx3-ubyte.gz, neither directly nor in mnist/"):
        data.load("mnist", folder=tmp_path)
    with pytest.raises(ValueError, match=r"has no olivettifaces.mat, neither directly nor in olivetti/"):
        data.load("faces", folder=tmp_path)


def test_corrupt_file_is_named_with_both_checksums(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    content = gzip.compress(bytes(16))
    for name in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (tmp_path / "mnist" / name).write_bytes(content)
    with pytest.raises(ValueError, match="delete it and copy or download it again") as error:
        data.load("mnist", folder=tmp_path)
    for part in (
        str(tmp_path / "mnist" / "train-images-idx3-ubyte.gz"),
        hashlib.sha256(content).hexdigest(),
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        f"{len(content)} bytes",
    ):
        assert part in str(error.value)


def test_without_a_network_labelled_digits_say_so_without_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sklearn.datasets

    def offline(*args: object, **kwargs: object) -> None:
        warnings.warn("A network error occurred. Retrying...", stacklevel=1)
        raise OSError("Name or service not known")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    with warnings.catch_warnings(record=True) as heard, pytest.raises(ValueError, match="t10k-labels-idx1") as error:
        labelled.load("mnist")
    assert not heard and "could not be downloaded (OSError: Name or service not known)" in str(error.value)


@pytest.mark.parametrize(
    ("task", "fetcher", "file"),
    [("mnist", "fetch_openml", "t10k-images-idx3"), ("faces", "fetch_olivetti_faces", "olivettifaces.mat")],
)
def test_without_a_network_it_says_where_to_put_the_files(
    task: str, fetcher: str, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sklearn.datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(sklearn.datasets, fetcher, offline)
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))  # set, but without the files
    with pytest.raises(ValueError, match="could not be downloaded .OSError: Name or service not known.") as error:
        data.load(task)
    assert file in str(error.value) and "--data FOLDER" in str(error.value) and "NATGRAD_DATA" in str(error.value)
