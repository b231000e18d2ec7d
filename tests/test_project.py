"""The house rules that a machine can check: which way imports point, file sizes, versions, paths."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import natgrad

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "natgrad"
MAX_LINES = 350
# The library runs without these. (torch picks NumPy up where it exists, but does not need it.)
BENCH_ONLY = ("numpy", "scipy", "sklearn", "matplotlib", "typer", "rich", "optuna")


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "_build" not in p.parts)


def imported_modules(path: Path) -> set[str]:
    """Dotted names that the file imports anywhere, also inside functions; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import; write the full name"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(package: Path, prefix: str) -> list[str]:
    files = [package] if package.is_file() else sorted(package.rglob("*.py"))
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported_modules(path)
        if name == prefix or name.startswith(prefix + ".")
    ]


def test_library_never_imports_the_bench() -> None:
    assert imports_of(LIBRARY, "natgrad_lab") == []


@pytest.mark.parametrize(
    ("room", "upstairs"),
    [
        ("linalg", ("natgrad.layers", "natgrad.operators", "natgrad.curvature", "natgrad.optim", "natgrad.model_view")),
        ("likelihoods", ("natgrad.layers", "natgrad.operators", "natgrad.curvature", "natgrad.optim")),
        ("model_view.py", ("natgrad.layers", "natgrad.operators", "natgrad.curvature", "natgrad.optim")),
        # Exact code is the oracle of the approximations, so it may not lean on them.
        ("operators/autodiff.py", ("natgrad.layers", "natgrad.curvature", "natgrad.optim", "natgrad.damping")),
        ("curvature", ("natgrad.optim",)),
        ("layers", ("natgrad.curvature", "natgrad.optim")),
    ],
)
def test_imports_point_downward(room: str, upstairs: tuple[str, ...]) -> None:
    path = LIBRARY / room
    assert path.exists()
    assert [line for prefix in upstairs for line in imports_of(path, prefix)] == []


def test_library_imports_without_the_bench_packages() -> None:
    program = f"""
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {BENCH_ONLY!r} else super().find_spec(name, path, target)
sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
import natgrad
assert not set({BENCH_ONLY!r}) & set(sys.modules)
print(natgrad.__version__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == natgrad.__version__


def test_public_names_exist() -> None:
    missing = [name for name in natgrad.__all__ if not hasattr(natgrad, name)]
    assert missing == []
    assert len(set(natgrad.__all__)) == len(natgrad.__all__)


def test_every_source_folder_is_a_package() -> None:
    folders = {path.parent for path in python_files("src")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_are_short() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in python_files("src", "tests", "benchmarks", "docs")}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_changelog_leads_with_the_version() -> None:
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == natgrad.__version__


def test_constraints_pin_everything_that_is_asked_for() -> None:
    def key(requirement: str) -> str:
        return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {key(r) for r in [*project["dependencies"], *(r for group in extras.values() for r in group)]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {key(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.+]+", line)}
    assert asked - pinned == set()


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|opt|Users)/")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    texts = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".csv", ".html", ".yml", ".cfg", ""}
    hits = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in texts and path.is_file() and path != Path(__file__):
            hits += [f"{name}: {m.group()}" for m in pattern.finditer(path.read_text(errors="replace"))]
    assert hits == []
