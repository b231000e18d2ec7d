"""What every test shares: one thread, repeatable Hypothesis examples, and where the data sets are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # `make test` runs one worker per core
settings.register_profile("natgrad", derandomize=True, deadline=None, max_examples=20, database=None)
settings.load_profile("natgrad")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test leaves what commands write (races, searches, runs) in the checkout."""
    folders = [ROOT / name for name in ("result", "results", "out", "runs")]
    before = [folder for folder in folders if folder.exists()]
    yield
    left = [folder.name for folder in folders if folder.exists() and folder not in before]
    assert not left, f"a test wrote {left} into the checkout; tests write to tmp_path"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with `mnist/`, `olivetti/` and the like; tests that need it are skipped without it."""
    folder = Path(os.environ.get("NATGRAD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set NATGRAD_DATA to the folder that holds mnist/ and olivetti/")
    return folder
