"""Races on a CNN and a character transformer: steps and CPU-seconds to the validation loss of tuned AdamW.

AdamW trains for N steps; the loss at its end is the target. Every contestant, AdamW itself among them, then trains for
0.6 N steps from the same parameters on the same batches, with the same schedule ending there: does it get to the
target, and after how many steps and CPU-seconds? A sweep (`--sweep`) gives each the same number of learning rates, at
the length of its race, seed 0, and writes benchmarks/race_rates.json; the races take other seeds. Contestants take
turns of 5 steps. A race that was ended goes on where it was: what is over stands in a file beside the results.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, median, positive, ratio, say
from benchmarks.race_contestants import BASELINE, ENTRIES, OURS
from benchmarks.race_runs import Trial, best_rates, crossing, final, in_turns, peak, sweep
from benchmarks.race_tasks import TASKS, RaceTask
from benchmarks.report import save, table, write_json
from natgrad_lab.records import environment

RATES = ROOT / "benchmarks" / "race_rates.json"
SHARE = 0.6
BUDGET = 4  # learning rates
MIB = 2**20


def length(task: RaceTask) -> int:
    """Steps of the contestants."""
    return round(SHARE * task.steps)


def write_sweep(task: RaceTask, budget: int, file: Path, command: str) -> None:
    """Sweep, and enter the winners and all results."""
    steps = {name: task.steps if name == BASELINE else length(task) for name in ENTRIES[task.name]}
    lines = sweep(task, ENTRIES[task.name], budget, steps, file)
    surroundings = {k: v for k, v in environment().items() if k != "command"}
    rows = [
        {"name": x["name"], "lr": x["lr"], "steps": x["steps"], "loss": final(x), "seconds": x["trace"][-1][1]}
        for x in lines
    ]
    found = {
        "command": command,
        "task": task.about,
        "rates": best_rates(lines),
        "settings": {name: entry.settings for name, entry in ENTRIES[task.name].items()},
        "results": rows,
        "environment": surroundings,
    }
    record = json.loads(RATES.read_text(encoding="utf-8")) if RATES.exists() else {}
    write_json(RATES, record | {task.name: found})
    file.unlink()


def tuned(task: RaceTask) -> dict[str, float]:
    """The learning rates that the sweep found.

    Raises:
        ValueError: there was none for this task.
    """
    record = json.loads(RATES.read_text(encoding="utf-8")) if RATES.exists() else {}
    if task.name not in record:
        raise ValueError(f"{RATES} has no {task.name}; run `python -m benchmarks races {task.name} --sweep`")
    return record[task.name]["rates"]


def trials(task: RaceTask, rates: dict[str, float], seeds: Sequence[int]) -> list[list[Trial]]:
    """By seed: the baseline at full length, and all contestants at theirs."""
    short = length(task)
    return [
        [
            Trial(BASELINE, rates[BASELINE], task.steps, seed),
            *(Trial(name, rates[name], short, seed) for name in ENTRIES[task.name]),
        ]
        for seed in seeds
    ]


def compare(task: RaceTask, lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By contestant: losses, ratios of steps and seconds to the target, and of a step; medians over the seeds."""
    by_seed: dict[int, dict[str, Any]] = {}
    for line in lines:
        key = "" if line["steps"] == task.steps else line["name"]
        by_seed.setdefault(line["seed"], {})[key] = line
    found = {}
    for name in ENTRIES[task.name]:
        pairs = [(runs[""], runs[name]) for runs in by_seed.values()]
        there = [crossing(own, final(base)) for base, own in pairs]
        ends = [base["trace"][-1] for base, _ in pairs]
        found[name] = {
            "loss": median(final(own) for _, own in pairs),
            "steps": median(None if c is None else c[0] / end[0] for c, end in zip(there, ends, strict=True)),
            "seconds": median(None if c is None else c[1] / end[1] for c, end in zip(there, ends, strict=True)),
            "reached": sum(c is not None for c in there),
            "step": median(
                ratio(own["trace"][-1][1] / own["trace"][-1][0], base["trace"][-1][1] / base["trace"][-1][0])
                for base, own in pairs
            ),
        }
    return found


def race_table(task: RaceTask, found: dict[str, dict[str, Any]], rates: dict[str, float], seeds: int) -> str:
    """One row for each contestant."""
    header = [
        "float32",
        "learning rate",
        f"loss after {length(task)} steps",
        "seeds at the target",
        "steps to it",
        "CPU-seconds to it",
        "a step",
        "peak memory, MiB",
    ]
    rows = [
        [
            ENTRIES[task.name][name].title,
            rates[name],
            f"{x['loss']:.4f}" if x["loss"] is not None else None,
            f"{x['reached']} of {seeds}",
            x["steps"],
            x["seconds"],
            x["step"],
            x["peak"] / MIB,
        ]
        for name, x in found.items()
    ]
    return table(header, rows)


def target_table(task: RaceTask, found: dict[str, dict[str, Any]]) -> str:
    """Whether natgrad's contestants meet the target."""
    rows = []
    for name in OURS:
        if name in found:
            steps, seconds = found[name]["steps"], found[name]["seconds"]
            met = steps is not None and steps <= SHARE, seconds is not None and seconds < 1
            rows.append([ENTRIES[task.name][name].title, steps, met[0], seconds, met[1]])
    return table(["", f"steps, at most {SHARE}", "met", "CPU-seconds, less than 1", "met"], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", default="transformer", choices=sorted(TASKS), help="default: %(default)s")
    parser.add_argument("--seeds", type=positive(int), default=3, help="so many, from 1 (default: %(default)s)")
    parser.add_argument("--steps", type=positive(int), help="N (default: the task's)")
    parser.add_argument("--sweep", action="store_true", help="find the learning rates instead")
    parser.add_argument(
        "--budget", type=positive(int), default=BUDGET, help="of the sweep: rates (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> None:
    task = TASKS[options.task](**({} if options.steps is None else {"steps": options.steps}))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        write_sweep(task, options.budget, options.out / f"races-{task.name}-sweep.jsonl", options.command)
        return
    rates, seeds = tuned(task), range(1, options.seeds + 1)
    file = options.out / f"races-{task.name}.jsonl"
    lines = [line for several in trials(task, rates, seeds) for line in in_turns(task, several, file)]
    found = compare(task, lines)
    for name, x in found.items():
        say(f"  memory of {name}")
        x["peak"] = peak(task, name, rates[name])
    targets = [final(line) for line in lines if line["steps"] == task.steps]
    ends = [line["trace"][-1][1] for line in lines if line["steps"] == task.steps]
    budget = len({row["lr"] for row in json.loads(RATES.read_text())[task.name]["results"] if row["name"] == BASELINE})
    save(
        f"races-{task.name}",
        f"A race to AdamW's validation loss: {task.name}",
        [
            f"{task.about[0].upper()}{task.about[1:]}. Tuned AdamW trains for {task.steps} steps (validation losses "
            f"{', '.join(f'{loss:.4f}' for loss in targets)} from seeds {', '.join(map(str, seeds))}, in a median of "
            f"{median(ends):.1f} CPU-seconds): its loss is the target. All then train for {length(task)} steps, with "
            "the same schedule ending there: up over the first twentieth, then half a cosine to 0. Steps and "
            "CPU-seconds to the target, and those of a step, are in units of AdamW's; medians of the seeds; a dash: "
            f"not reached by most of them. Learning rates are the best of {budget} for each (`--sweep`, seed 0, all in "
            "`benchmarks/race_rates.json`). Weight decay is the same for all, SGD's and that of SGD inside coupled. "
            "Muon takes the hidden weights, AdamW with the same rate the others. bf16: no hardware that multiplies it "
            "was at hand, so that there is no such column; Muon's own iteration runs in bf16, here emulated.",
            race_table(task, found, rates, len(seeds)),
            target_table(task, found),
        ],
        {
            "task": task.about,
            "steps": task.steps,
            "rates": rates,
            "settings": {name: entry.settings for name, entry in ENTRIES[task.name].items()},
            "found": found,
            "runs": lines,
        },
        command=options.command,
        folder=options.out,
    )
    file.unlink()
