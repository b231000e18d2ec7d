"""The scripts under examples/ run, at a small size, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_physics_informed_network_and_its_picture(tmp_path: Path) -> None:
    example = load("physics_informed")
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(  # f is −u'' of the solution it is compared with
        torch.func.jvp(
            lambda t: torch.func.jvp(example.exact, (t,), (torch.ones_like(t),))[1], (x,), (torch.ones_like(x),)
        )[1],
        -example.source(x),
    )
    before = example.error(example.make_model(8, seed=0))
    out = tmp_path / "picture.png"
    errors = example.main(["--steps", "20", "--width", "8", "--points", "32", "--seconds", "60", "--out", str(out)])
    assert errors["natural gradient"] < 0.6 * before
    assert errors["natural gradient"] < errors["Adam"]
    assert out.stat().st_size > 5000
