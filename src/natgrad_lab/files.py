"""Data files on disk: found, verified and read, with messages that say what to do when that fails; and the cache."""

import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "cifar10_subset.npz": "438f4a99164295bb9a9f9ee6cde6f0bba29dc97f9c85479f7ce87094392a19f1",
    "olivettifaces.mat": "b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d",
}


class DataError(ValueError):
    """Data that are missing, corrupt or asked for wrongly; the message says what to try."""


def find(names: Iterable[str], subfolder: str, folder: Path | None) -> dict[str, Path] | None:
    """Where the files are: in `folder`, else in the folder that NATGRAD_DATA names, directly or in `subfolder`.

    Returns:
        A path per name; None if no `folder` was given and NATGRAD_DATA is not set or has not all the files.

    Raises:
        DataError: `folder` was given and some are not in it.
    """
    names = list(names)
    named = folder or (Path(os.environ["NATGRAD_DATA"]) if os.environ.get("NATGRAD_DATA") else None)
    if named is None:
        return None
    for place in (named, named / subfolder):
        paths = {name: place / name for name in names}
        if all(path.is_file() for path in paths.values()):
            return paths
    if folder is None:
        return None
    missing = [n for n in names if not ((folder / n).is_file() or (folder / subfolder / n).is_file())] or names
    raise DataError(
        f"the data folder {folder} has no {', '.join(missing)}, neither directly nor in {subfolder}/; "
        "put the original files there, or leave the folder out to download them"
    )


def read_verified(path: Path) -> bytes:
    """The contents of a known data file.

    Raises:
        DataError: it cannot be read, or its SHA-256 is not that of the original.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read ({error.strerror}); check its permissions") from error
    got, expected = hashlib.sha256(content).hexdigest(), SHA256[path.name]
    if got != expected:
        raise DataError(
            f"the data file {path} is corrupt or not the original: its SHA-256 is {got} ({len(content)} bytes), "
            f"expected {expected}; delete it and copy or download it again"
        )
    return content


def read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of unsigned bytes: magic number 0, 0, 8, dimensions; their sizes, big-endian; the bytes."""
    content = gzip.decompress(read_verified(path))
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)


def read_faces(path: Path) -> Tensor:
    """The Olivetti photographs, upright, uint8 [400, 64, 64]; ten of each person, person by person."""
    from scipy.io import loadmat

    columns = loadmat(io.BytesIO(read_verified(path)))["faces"]
    return torch.from_numpy(np.ascontiguousarray(columns.T.reshape(400, 64, 64).transpose(0, 2, 1)))


CIFAR_BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_SUBSET = "cifar10_subset.npz"
CIFAR_ROW = 1 + 3 * 32 * 32  # the label, then red, green and blue


def read_cifar10(folder: Path | None) -> list[np.ndarray]:
    """CIFAR-10: x_train, y_train, x_test, y_test, uint8; rows of 1024 red, 1024 green and 1024 blue values.

    Args:
        folder: With the six `.bin` files of the "binary version" of its author's site, or a NumPy archive
            `cifar10_subset.npz` of part of the images under the four names above; directly or in `cifar10/`. None:
            the folder that NATGRAD_DATA names.

    Raises:
        DataError: there are none, or they are corrupt.
    """
    found = None
    for names in ((CIFAR_SUBSET,), CIFAR_BATCHES):
        try:
            found = found or find(names, "cifar10", folder)
        except DataError:
            continue
    if found is None:
        raise DataError(
            f"CIFAR-10 was not found: put {CIFAR_BATCHES[0]} to {CIFAR_BATCHES[4]} and {CIFAR_BATCHES[5]} (the binary "
            "version) into a folder and name it with --data FOLDER or in the environment variable NATGRAD_DATA"
        )
    if CIFAR_SUBSET in found:
        with np.load(io.BytesIO(read_verified(found[CIFAR_SUBSET])), allow_pickle=False) as archive:
            return [archive[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    rows = []
    for name in CIFAR_BATCHES:
        content = np.frombuffer(found[name].read_bytes(), np.uint8)
        if not content.size or content.size % CIFAR_ROW or content[::CIFAR_ROW].max() > 9:
            raise DataError(
                f"the data file {found[name]} is corrupt: expected rows of {CIFAR_ROW} bytes that begin with a label "
                f"from 0 to 9, got {content.size} bytes; delete it and copy or download it again"
            )
        rows.append(content.reshape(-1, CIFAR_ROW))
    train, test = np.concatenate(rows[:5]), rows[5]
    return [train[:, 1:], train[:, 0], test[:, 1:], test[:, 0]]


def cache_folder() -> Path:
    """Where generated data are kept: NATGRAD_CACHE, else natgrad in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("NATGRAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natgrad"


def cached(name: str, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, a tensor, from the cache if it is there and its checksum is right; else made, and written.

    The file appears whole or not at all. A cache that cannot be written costs time, not the result.
    """
    path = cache_folder() / f"{name}.npz"
    kept = _read_cache(path)
    if kept is not None:
        return kept
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{name}.", suffix=".tmp", delete=False) as file:
            try:
                np.savez_compressed(file, data=made.numpy(), sha256=np.array(_digest(made)))
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError:
        pass
    return made


def _read_cache(path: Path) -> Tensor | None:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as archive:
            kept, digest = torch.from_numpy(archive["data"]), str(archive["sha256"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return kept if digest == _digest(kept) else None


def _digest(tensor: Tensor) -> str:
    content = tensor.contiguous().numpy()
    return hashlib.sha256(f"{content.dtype} {content.shape}".encode() + content.tobytes()).hexdigest()
