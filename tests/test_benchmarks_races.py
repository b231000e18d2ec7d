"""The races at a tiny scale: who takes part, what goes on after a kill, how rates are swept and losses compared."""

import json
import math

import pytest
import torch

from benchmarks import race_contestants, race_runs, race_tasks, races
from benchmarks.race_runs import Trial, best_rates, crossing, final, in_turns, next_rate, steps_of


@pytest.fixture
def sonnets(tmp_path, monkeypatch):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    return race_tasks.transformer(width=8, layers=1, context=8, batch=4, steps=10)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    return race_tasks.cnn(width=4, batch=16, steps=10)


def line(name, steps, seed, *trace, lr=1.0):
    return {"name": name, "lr": lr, "steps": steps, "seed": seed, "trace": list(trace)}


def test_the_schedule_rises_and_falls():
    shares = [race_tasks.schedule(step, 40) for step in range(1, 41)]
    assert shares[:2] == [0.5, 1.0] and all(a > b > 0 for a, b in zip(shares[1:-1], shares[2:], strict=True))
    assert shares[20] == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 39)))
    assert race_tasks.schedule(1, 5) == 1.0


@pytest.mark.parametrize("name", race_contestants.ENTRIES["cnn"])
@pytest.mark.parametrize("kind", ["sonnets", "digits"])
def test_every_contestant_changes_all_parameters(name, kind, request):
    task = request.getfixturevalue(kind)
    if name not in race_contestants.ENTRIES[task.name]:
        return
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    model, racer = race_runs.make(task, Trial(name, 1e-2, 3, 0))
    before = [p.detach().clone() for p in model.parameters()]
    batches = task.batches(0)
    for _ in range(2):  # SOAP's first step only begins its averages
        racer.step(*next(batches))
    # Unused characters and positions keep their zero gradient: some of each tensor moves.
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    racer.set_rate(0.0)
    assert all(group["lr"] == 0 for group in racer.groups)


def test_muon_takes_the_hidden_weights_as_matrices(digits):
    model = digits.make_model(0)
    weights = race_contestants.hidden(model)
    assert len(weights) == 9 and all(w.ndim == 4 for w in weights)  # 7 of 3 x 3, two shortcuts; not the last layer
    before = [w.detach().clone() for w in weights]
    racer = race_contestants.muon(model, digits, 0.1, 0, weight_decay=0.0)
    racer.step(*next(digits.batches(0)))
    for w, old in zip(weights, before, strict=True):
        step = (w.detach() - old).flatten(1) / (0.1 * 0.2 * math.sqrt(max(len(w), w[0].numel())))
        values = torch.linalg.svdvals(step)  # of an approximately orthogonal matrix
        assert 0.4 < values.min() and values.max() < 1.3


def test_runs_that_are_over_are_not_run_again(sonnets, tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    trials = [Trial("adamw", 1e-2, 10, 1), Trial("eigen-adam", 1e-2, 6, 1)]
    first = in_turns(sonnets, trials, file)
    assert [x["name"] for x in map(json.loads, file.read_text().splitlines())] == ["eigen-adam", "adamw"]
    assert [x["trace"][-1][0] for x in first] == [10, 6] and [x["trace"][0][0] for x in first] == [3, 3]
    monkeypatch.setattr(race_runs, "make", lambda *_: pytest.fail("run again"))
    assert in_turns(sonnets, trials, file) == first
    with pytest.raises(pytest.fail.Exception):
        in_turns(sonnets, [Trial("adamw", 2e-2, 10, 1)], file)


def test_contestants_that_take_turns_do_not_disturb_each_other(sonnets, tmp_path):
    trials = [Trial("adamw", 1e-2, 10, 1), Trial("preconditioned", 1e-2, 6, 1)]
    together = in_turns(sonnets, trials, tmp_path / "runs.jsonl")
    for trial, found in zip(trials, together, strict=True):
        alone = [x for x in steps_of(sonnets, trial) if x is not None][0]
        assert [(n, loss) for n, _, loss in alone["trace"]] == [(n, loss) for n, _, loss in found["trace"]]


def test_a_run_that_diverges_ends_there(sonnets, monkeypatch):
    object.__setattr__(sonnets, "evaluate", lambda model: math.nan)
    (found,) = [x for x in steps_of(sonnets, Trial("adamw", 1e-2, 10, 1)) if x is not None]
    assert found["trace"] == [[3, found["trace"][0][1], None]]
    assert final(found) == math.inf and crossing(found, 10.0) is None


def test_a_sweep_looks_around_the_best_rate():
    def search(loss, count=4):
        tried = {}
        for _ in range(count):
            lr = next_rate(tried, 1.0)
            tried[lr] = loss(lr)
        return list(tried)

    assert search(lambda lr: lr) == pytest.approx([1, 3, 1 / 3, 1 / 9])
    assert search(lambda lr: -lr) == pytest.approx([1, 3, 9, 27])
    assert search(lambda lr: abs(math.log(lr / 1.2))) == pytest.approx([1, 3, 1 / 3, math.sqrt(3)])
    assert search(lambda lr: abs(math.log(lr / 4))) == pytest.approx([1, 3, 9, 27**0.5])
    assert search(lambda lr: math.inf if lr > 0.5 else lr) == pytest.approx([1, 3, 1 / 3, 1 / 9])


def test_steps_and_seconds_are_compared_seed_by_seed(sonnets):
    lines = [
        line("adamw", 10, 1, [5, 5.0, 3.0], [10, 10.0, 2.0]),
        line("adamw", 6, 1, [5, 5.0, 3.0], [6, 6.0, 2.5]),
        line("eigen-adam", 6, 1, [5, 8.0, 2.0], [6, 9.0, 1.9]),
        line("adamw", 10, 2, [10, 20.0, 2.5]),
        line("adamw", 6, 2, [6, 12.0, 2.5]),
        line("eigen-adam", 6, 2, [4, 8.0, 2.5], [6, 9.0, 1.8]),
    ]
    every = [line(name, 6, seed, [6, 1.0, None]) for name in ("preconditioned", "muon", "soap") for seed in (1, 2)]
    found = races.compare(sonnets, lines + every)
    assert found["eigen-adam"] == {
        "loss": pytest.approx(1.85),
        "steps": 0.45,
        "seconds": pytest.approx(0.6),
        "reached": 2,
        "step": 1.125,
    }
    assert found["adamw"] == {"loss": 2.5, "steps": None, "seconds": None, "reached": 1, "step": 1.0}
    assert found["muon"]["loss"] is None and found["muon"]["reached"] == 0
    rows = races.target_table(sonnets, found).split("\n")
    assert rows[3] == "| natgrad: EigenAdam | 0.45 | yes | 0.6 | yes |" and rows[2].count("**no**") == 2
    rates = dict.fromkeys(found, 0.1)
    table = races.race_table(sonnets, {k: x | {"peak": 2**20} for k, x in found.items()}, rates, 2).split("\n")
    assert len(table) == 2 + len(found) and "| AdamW | 0.1 | 2.5000 | 1 of 2 | – | – | 1 | 1 |" in table


def test_a_race_at_a_tiny_scale(sonnets, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.setattr(races, "RATES", tmp_path / "rates.json")
    monkeypatch.setattr(races, "TASKS", {"transformer": lambda: sonnets})
    options = races.argparse.Namespace(
        task="transformer", seeds=1, steps=None, sweep=True, budget=2, out=tmp_path, command="python -m benchmarks x"
    )
    with pytest.raises(ValueError, match="--sweep"):
        races.main(races.argparse.Namespace(**vars(options) | {"sweep": False}))
    races.main(options)
    kept = json.loads((tmp_path / "rates.json").read_text())["transformer"]
    assert len(kept["results"]) == 2 * len(race_contestants.ENTRIES["transformer"])
    options.sweep = False
    races.main(options)
    text = (tmp_path / "races-transformer.md").read_text()
    assert text.startswith("## A race to AdamW's validation loss: transformer") and "best of 2 for each" in text
    runs = json.loads((tmp_path / "races-transformer.json").read_text())["runs"]
    assert [r["steps"] for r in runs] == [10] + [6] * 5 and not list(tmp_path.glob("*.jsonl"))


def test_the_rates_are_what_the_sweep_found():
    record = json.loads(races.RATES.read_text(encoding="utf-8"))
    for name, found in record.items():
        entries = race_contestants.ENTRIES[name]
        assert found["command"].startswith(f"python -m benchmarks races {name}") and "--sweep" in found["command"]
        assert found["settings"] == {key: entry.settings for key, entry in entries.items()}
        assert found["rates"].keys() == entries.keys()
        rows = [{**row, "trace": [[0, 0.0, row["loss"]]]} for row in found["results"]]
        assert best_rates(rows) == found["rates"]
        counts = {key: sum(row["name"] == key for row in rows) for key in entries}
        assert len(set(counts.values())) == 1  # one budget for all
