"""A search as an Optuna study: opened or continued, run by one process or several, stopped without losing a result."""

import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from natgrad_lab.search.sampler import BiasedRandomSampler
from natgrad_lab.search.spaces import Space, grid
from natgrad_lab.search.trial import Budget, Workers, train
from natgrad_lab.signals import between_updates

SAMPLERS = ("biased", "random", "grid", "tpe")
ATTRIBUTE = "natgrad search"  # of the study: what its trials have in common
FINISHED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


class Grid(GridSampler):
    """Optuna's grid, in a loop that counts its trials itself."""

    def after_trial(self, *arguments: Any, **named: Any) -> None:
        """Nothing: GridSampler would stop `study.optimize`, which does not run here."""


class Observer(Protocol):
    """Who watches a search."""

    def finished(self, trial: FrozenTrial, done: int) -> None:
        """One more trial has a result; `done` of them have one."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the line that Optuna says for every study and trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """Memory, an SQLite file, or any database that Optuna takes.

    Args:
        storage: "memory", the path of a file, or a database URL.

    Raises:
        ValueError: it cannot be used.
    """
    if storage == "memory":
        return optuna.storages.InMemoryStorage()
    url = storage if "://" in storage else f"sqlite:///{storage}"
    # Several workers share a file: wait for each other instead of failing.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))
    except Exception as error:  # of SQLAlchemy, of the database's own driver, or because there is no driver
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"the storage {storage!r} cannot be opened ({reason[0]}); --storage takes memory, the path of an SQLite "
            "file or a database URL such as postgresql://user@host/name"
        ) from error


def open_study(storage: optuna.storages.BaseStorage, name: str, task: str, budget: Budget, space: Space) -> Study:
    """The study of this name: a new one, or the one that is there, if its trials are of the same kind.

    Raises:
        ValueError: it is of another kind.
    """
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    kinds = {key: optuna.distributions.distribution_to_json(value) for key, value in space.items()}
    asked = {"task": task, **asdict(budget), "space": kinds}
    there = study.user_attrs.get(ATTRIBUTE)
    if there is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"the study {name!r} was not made by natgrad search; choose another name with --study")
        study.set_user_attr(ATTRIBUTE, asked)
        return study
    for key, value in asked.items():
        if there.get(key) != value:
            was = "another search space" if key == "space" else f"{key} {there.get(key)}, not {value}"
            raise ValueError(f"the study {name!r} has {was}; leave it as it was, or choose another name with --study")
    return study


def make_sampler(kind: str, study: Study, space: Space, trials: int, seed: int) -> BaseSampler:
    """A sampler by its name on the command line. A grid is kept with the study: whoever continues it has the same."""
    if kind == "grid":
        points = study.user_attrs.get("grid")
        if points is None:
            points = grid(space, trials)
            study.set_user_attr("grid", points)
        return Grid(points, seed=seed)
    if kind == "biased":
        return BiasedRandomSampler(seed)
    # A seeded stream of Optuna's starts anew with every process, and would propose the same points once more.
    fresh = None if study.get_trials(deepcopy=False) else seed
    return RandomSampler(fresh) if kind == "random" else TPESampler(seed=fresh)


def wanted(study: Study, kind: str, trials: int) -> int:
    """How many trials the study is to have: those asked for, but no more than the grid has points."""
    if kind != "grid":
        return trials
    points = 1
    for values in study.user_attrs["grid"].values():
        points *= len(values)
    return min(trials, points)


def results(study: Study) -> list[FrozenTrial]:
    """The trials that are finished, by number."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in FINISHED]


class Search:
    """Runs trials until the study has as many as it is to have.

    Args:
        study: The study, with its sampler.
        kind: Name of the sampler, recorded with each trial.
        space: What is sampled.
        budget: What each trial gets.
        total: How many finished trials end the search, those of earlier sessions included.
        observer: Who watches.
    """

    def __init__(
        self, study: Study, kind: str, space: Space, budget: Budget, total: int, observer: Observer | None = None
    ) -> None:
        self.study, self.kind, self.space, self.budget = study, kind, space, budget
        self.total, self.observer = total, observer
        self._running: dict[Future[dict[str, Any]], Trial] = {}

    def run(self, task: Any) -> bool:
        """One trial after the other, in this process; returns whether Ctrl-C ended it."""
        with between_updates() as interrupted:
            while self._left() > 0:
                trial = self._ask()
                try:
                    self._tell(trial, train(task, self.budget, trial.params, interrupted))
                    interrupted()
                except KeyboardInterrupt:
                    self._give_back(trial)
                    return True
        return False

    def run_in(self, workers: Workers, jobs: int, poll: float = 0.2) -> bool:
        """`jobs` trials at a time in other processes; returns whether Ctrl-C ended it."""
        try:
            with between_updates() as interrupted:
                while self._running or self._left() > 0:
                    while len(self._running) < min(jobs, len(self._running) + self._left()):
                        trial = self._ask()
                        self._running[workers.submit(self.budget, trial.params)] = trial
                    for future in wait(self._running, timeout=poll, return_when=FIRST_COMPLETED).done:
                        self._tell(self._running[future], future.result())
                        del self._running[future]
                    interrupted()
        except KeyboardInterrupt:
            return True
        finally:
            workers.stop()
            for trial in self._running.values():
                self._give_back(trial)
            self._running.clear()
        return False

    def _left(self) -> int:
        return self.total - len(results(self.study)) - len(self._running)

    def _ask(self) -> Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's about experimental parts
            return self.study.ask(self.space)

    def _tell(self, trial: Trial, found: dict[str, Any]) -> None:
        error = found.pop("error")
        for name, value in {**found, "sampler": self.kind}.items():
            trial.set_user_attr(name, value if value == value else None)
        state = TrialState.COMPLETE if abs(error) < float("inf") else TrialState.FAIL
        done = self.study.tell(trial, error if state == TrialState.COMPLETE else None, state=state)
        if self.observer is not None:
            self.observer.finished(done, len(results(self.study)))

    def _give_back(self, trial: Trial) -> None:
        """Let the next session run a trial that was interrupted: a failure would count as a bad result."""
        if self.study._storage.get_trial(trial._trial_id).state == TrialState.RUNNING:
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
