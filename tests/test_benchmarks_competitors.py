"""The benchmark of other libraries at a tiny scale: form of its table, names of what is missing; no timings."""

import pytest
import torch
from torch import nn

from benchmarks import competitors


def _table(text: str) -> list[list[str]]:
    lines = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_what_is_installed_is_measured_and_the_rest_is_named(monkeypatch):
    absent = ("not-a-package-of-anybody", competitors.natgrad, "nothing")

    def failing(model, x, y):
        raise NotImplementedError("no such layer")

    monkeypatch.setattr(
        competitors,
        "LIBRARIES",
        {
            "natgrad": competitors.LIBRARIES["natgrad"],
            "absent": absent,
            "failing": ("torch", failing, ""),
        },
    )
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6)
    found, failed = competitors.measure(lambda: competitors.cnn(2), x, y, count=1, rounds=1)
    assert found.keys() == {"", "natgrad"} and all(seconds > 0 for seconds in found.values())
    assert failed == {"failing": "NotImplementedError: no such layer"}
    text = competitors.step_table({"CNN": found}, {"CNN": failed})
    rows = _table(text)
    assert [len(row) for row in rows] == [3] * 5
    assert rows[3][0] == "absent (not installed)" and rows[3][2] == rows[4][2] == "–"
    assert text.endswith("Failed: failing on the CNN: NotImplementedError: no such layer")


@pytest.mark.parametrize("name", competitors.LIBRARIES)
def test_every_adapter_changes_the_parameters_of_both_models(name):
    package, maker, _ = competitors.LIBRARIES[name]
    if competitors.version(package) is None:
        pytest.skip(f"{package} is not installed")
    for model, x in ((competitors.cnn(2), torch.randn(6, 3, 8, 8)), (competitors.mlp(4), torch.randn(6, 784))):
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        maker(model, x, torch.arange(6))()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        assert torch.isfinite(after).all() and (after != before).any()
