"""The one list of the benchmarks, in the order of the page docs/benchmarks.md."""

# Each with the tasks that it runs on, one after the other, where its command takes a task.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "update-cost": (),
    "thesis-cost": (),
    "convergence": ("curves", "mnist"),
    "robustness": (),
    "memory": (),
    "fisher-products": (),
    "truncated-newton": (),
    "gradient-covariance": (),
    "operations": (),
    "chain-setup": (),
    "layer-cost": (),
    "competitors": (),
    "races": ("transformer", "cnn"),
    "search": (),
    "sweep": (),
}


def runs(name: str) -> list[list[str]]:
    """The words of the commands that make up a benchmark."""
    return [[name, task] for task in BENCHMARKS[name]] or [[name]]


def results() -> list[str]:
    """The names of the files that the benchmarks write, in the order of the page."""
    return ["-".join(words) for name in BENCHMARKS for words in runs(name)]
