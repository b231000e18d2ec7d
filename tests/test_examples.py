"""The scripts under examples/ run, at a small size, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fits_a_terminal(printed: str, picture: Path) -> None:
    """Of 80 columns; the path of the picture is as long as it is."""
    lines = printed.splitlines()
    assert lines[-1] == str(picture) and max(map(len, lines[:-1])) <= 80


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


def test_image_classifier_on_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = load("image_classifier")
    with torch.device("meta"):
        resnet20 = example.make_model(3, 16, 3, seed=0)
    layers = [m for m in resnet20.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert sum(layer.weight.shape[2:] != (1, 1) for layer in layers) == 20
    assert sum(p.numel() for p in resnet20.parameters()) == 272_282
    out = tmp_path / "picture.png"
    sizes = ["--data", "digits", "--width", "4", "--blocks", "1", "--batch", "64", "--evaluations", "3"]
    best = example.main([*sizes, "--steps", "40", "--rates", "1", "--out", str(out)])
    assert list(best) == ["SGD", "AdamW", "preconditioned SGD", "EigenAdam"] == [run.method for run in best.values()]
    assert all(run.steps == [13, 26, 39, 40] and run.seconds == sorted(run.seconds) for run in best.values())
    for ours in ("preconditioned SGD", "EigenAdam"):
        assert best[ours].losses[-1] < 0.8 * min(best["SGD"].losses[-1], best["AdamW"].losses[-1])
    assert out.stat().st_size > 5000
    fits_a_terminal(capsys.readouterr().out, out)


def test_image_classifier_falls_back_to_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    assert load("image_classifier").load().name == "digits"
    assert load("char_transformer").load().name == "sonnets"


def test_char_transformer_on_two_sonnets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = load("char_transformer")
    text = example.load("sonnets")
    x, y = text.windows(text.train, 8, 3, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (3, 8) and torch.equal(x[:, 1:], y[:, :-1])
    model = example.make_model(len(text.characters), 8, 16, 1, seed=0)
    changed = x.clone()
    changed[:, 5] += 1
    torch.testing.assert_close(model(x)[:, :5], model(changed)[:, :5])  # no look ahead
    assert not torch.allclose(model(x)[:, 5:], model(changed)[:, 5:])
    out = tmp_path / "picture.png"
    sizes = ["--data", "sonnets", "--width", "16", "--layers", "1", "--context", "16", "--evaluations", "2"]
    best = example.main([*sizes, "--steps", "60", "--rates", "1", "--out", str(out)])
    uniform = torch.tensor(float(len(text.characters))).log()
    assert list(best) == ["AdamW", "preconditioned AdamW", "EigenAdam"]
    assert all(run.losses[-1] < 0.85 * uniform for run in best.values())
    assert out.stat().st_size > 5000
    fits_a_terminal(capsys.readouterr().out, out)


def test_lora_trains_the_adapters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = load("lora")
    base = example.pretrained(16, 100, seed=0)
    x, y, _, _ = example.load(example.FIRST)
    assert (base(x).argmax(1) == y).float().mean() > 0.9
    model = example.adapted(base, 2, seed=0)
    torch.testing.assert_close(model(x), base(x))  # adapters begin at 0
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"down", "up"}
    out = tmp_path / "picture.png"
    best = example.main(["--steps", "120", "--rates", "1", "--evaluations", "3", "--out", str(out)])
    assert best["preconditioned SGD"].losses[-1] < 0.8 * best["AdamW"].losses[-1]
    assert out.stat().st_size > 5000
    fits_a_terminal(capsys.readouterr().out, out)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--rates", "-1"], ["--width", "0"], ["--batch", "1.5"]])
def test_numbers_that_make_no_run_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(SystemExit, match="2"):
        load("image_classifier").main(words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"argument {words[0]}: expected a positive whole number, got {words[1]!r}")
