"""`natgrad paper`: recipes leave records, stopped runs go on, plots read records, and the docs show full sizes only."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.cells import cell_len

from natgrad_lab import cli
from natgrad_lab.recipes import Size, recipe
from natgrad_lab.recipes.base import ALSO, all_recipes, find
from natgrad_lab.recipes.run import Record, Run

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(all_recipes())
PAPERS = ROOT / "docs" / "papers"


def counting(calls: list[str]) -> Any:
    """A recipe of three parts that notes which ones were computed and stops before the third, once."""

    @recipe("test-fig1", title="a test", source="[TEST]", full=Size(1, {"parts": 3, "x": (1, 2)}), quick=Size(1, {}))
    def compute(run: Run) -> None:
        for i in range(run.configuration["parts"]):

            def part(i: int = i) -> dict[str, Any]:
                calls.append(str(i))
                if calls == ["0", "1", "2"]:
                    raise KeyboardInterrupt
                run.save("numbers", {"i": torch.tensor(i)})
                return {"i": i, "nan": float("nan")}

            run.part(f"part {i}", part)

    return compute


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from natgrad_lab.recipes import base as module

    monkeypatch.setattr(module, "_RECIPES", dict(module._RECIPES))


@pytest.mark.parametrize("name", NAMES)
def test_quick_size_runs_and_is_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    monkeypatch.setenv("NATGRAD_CACHE", str(tmp_path / "cache"))
    assert cli.run(["paper", "run", name, "--quick"]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("This is", "[", "Picture"))) <= 80
    folder = Path("runs/paper") / f"{name}-quick"
    record = Record.read(folder)
    assert record.finished and record.quick and record.results
    assert record.content["environment"]["natgrad"]
    pictures = list(folder.glob("*.png"))
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.info["natgrad-size"] == "quick"
            assert image.info["natgrad-record"] == name
            assert min(image.size) > 200
        picture.unlink()
    assert cli.run(["paper", "plot", name, "--quick"]) == 0
    assert all(picture.exists() for picture in pictures)
    assert cli.run(["paper", "plot", name]) == 2
    assert f"there is one of the other size in runs/paper/{name}-quick" in capsys.readouterr().err


def test_stopped_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    calls: list[str] = []
    made = counting(calls)
    with pytest.raises(KeyboardInterrupt):
        Run(made, tmp_path).execute()
    assert calls == ["0", "1", "2"]
    run = Run(made, tmp_path)
    assert not run.finished and list(run.results) == ["part 0", "part 1"]
    record = run.execute()
    assert calls == ["0", "1", "2", "2"]
    assert record.results["part 2"] == {"i": 2, "nan": None}
    assert record.tensors("numbers")["i"] == 2
    again = Run(made, tmp_path)
    assert again.finished
    again.execute()
    assert calls == ["0", "1", "2", "2"]
    assert not list(tmp_path.glob("*.tmp"))


def test_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    made = counting([])
    Run(made, tmp_path)
    Run(made, tmp_path)
    with pytest.raises(ValueError, match="another quick.*--again"):
        Run(made, tmp_path, quick=True)
    with pytest.raises(ValueError, match="another seed"):
        Run(made, tmp_path, seed=1)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    run = Run(counting([]), tmp_path)
    run.save("numbers", {"i": torch.arange(1000)})
    content = (tmp_path / "numbers.pt").read_bytes()
    (tmp_path / "numbers.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"numbers\.pt is missing or damaged"):
        run.load("numbers")
    assert run.load("nothing") is None


def test_stray_settings_and_long_titles_are_refused() -> None:
    with pytest.raises(ValueError, match="the quick size sets"):
        recipe("x", title="", source="", full=Size(1, {"a": 1}), quick=Size(1, {"b": 1}))(lambda run: None)
    with pytest.raises(ValueError, match="45 characters"):
        recipe("x", title="a" * 45, source="", full=Size(1), quick=Size(1))(lambda run: None)


def test_figures_10_and_11_are_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = all_recipes()
    assert all(other in known and name not in known for name, other in ALSO.items())
    assert find("kfac-fig11-mnist") is find("kfac-fig10-mnist")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["paper", "plot", "kfac-fig11"]) == 2
    assert "runs/paper/kfac-fig10; make it with natgrad paper run kfac-fig10" in capsys.readouterr().err


def test_list_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["paper", "list"]) == 0
    out = capsys.readouterr().out
    assert max(cell_len(line.rstrip()) for line in out.splitlines()) <= 80  # the accent of F̃ takes no column
    assert all(name in out for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "kfac-fg2"], "Did you mean 'kfac-fig2'?"),
        (["plot", "kfac-fig2"], "there is no record in runs/paper/kfac-fig2; make it with natgrad paper run kfac-fig2"),
        (["run", "kfac-fig2", "--data", "nowhere"], "the data folder nowhere does not exist"),
        (["run", "kfac-fig2", "--device", "tpu"], "the device 'tpu' cannot be used"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["paper", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def _faults(papers: Path) -> list[str]:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from check_records import faults
    finally:
        sys.path.pop(0)
    return faults(papers)


def test_pages_show_full_sizes() -> None:
    assert _faults(PAPERS) == []


def test_pages_of_quick_records_are_faults(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "kfac-fig2.md").write_text("A page.")
    assert _faults(tmp_path) == ["papers/kfac-fig2.md has no record papers/files/kfac-fig2.json"]
    record = json.loads((PAPERS / "files" / "kfac-fig2.json").read_text())
    (tmp_path / "files" / "kfac-fig2.json").write_text(json.dumps(record))
    assert _faults(tmp_path) == []
    (tmp_path / "files" / "kfac-fig2.json").write_text(json.dumps({**record, "quick": True}))
    assert ["quick size" in fault for fault in _faults(tmp_path)] == [True]
    (tmp_path / "files" / "kfac-fig2.json").write_text(json.dumps({**record, "started": "another time"}))
    (tmp_path / "files" / "kfac-fig2.png").write_bytes((PAPERS / "files" / "kfac-fig2.png").read_bytes())
    assert ["another record" in fault for fault in _faults(tmp_path)] == [True]
