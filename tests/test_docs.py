"""What the documentation says is run: code blocks execute, named files exist, links between pages lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if PYTHON_BLOCK.search(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page form one program; the assertions in them count."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    # Blank lines in front keep the line numbers of the page in tracebacks.
    namespace: dict[str, object] = {"__name__": "page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in PYTHON_BLOCK.finditer(text):
            code = "\n" * text[: block.start(1)].count("\n") + block.group(1)
            exec(compile(code, str(page), "exec"), namespace)


def test_equation_table_points_at_files_and_names_that_exist() -> None:
    rows = [line for line in (ROOT / "docs" / "equations.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows if "`" in row]
    assert len(rows) > 20
    for _equation, _says, symbols, files in rows:
        paths = [ROOT / "src" / file for file in re.findall(r"`([\w/]+\.py)`", files)]
        assert paths and all(path.exists() for path in paths), files
        source = "".join(path.read_text() for path in paths)
        for symbol in re.findall(r"`([\w.]+)", symbols):
            assert re.search(rf"\b{symbol.split('.')[-1]}\b", source), f"{symbol} is not in {files}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []
