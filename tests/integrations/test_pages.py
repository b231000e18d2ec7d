"""The code of "Loops you do not own" that needs other packages runs, as one program."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "loops.md"


@pytest.mark.filterwarnings("ignore")
def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "accelerate", "transformers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    program = blocks[1:]  # the first one shows three lines of the others
    namespace: dict[str, object] = {"__name__": "page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in program:
            exec(compile(block, str(PAGE), "exec"), namespace)
    assert (tmp_path / "half.ckpt").exists() and (tmp_path / "state").is_dir()
