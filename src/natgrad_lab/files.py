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
