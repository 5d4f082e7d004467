"""A sweep without server or account: the same config, searched in this process."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from safe_lr.loggers import is_stop_request
from safe_lr.sweeps.checks import check, is_number, wandbs_search
from safe_lr.sweeps.metric import Metric
from safe_lr.sweeps.programs import Program
from safe_lr.sweeps.pruning import PRUNED
from safe_lr.sweeps.spaces import Choice, space
from safe_lr.sweeps.stopping import Stopping

ENGINES = ("auto", "sweeps", "optuna", "built-in")
Status = Literal["finished", "pruned", "failed"]
Train = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        number: Counts from 0.
        params: What it ran with.
        status: `finished`, `pruned` (it said why, under `safe_lr_pruned`) or `failed` (it raised, or returned no finite
            value of the metric).
        value: The metric; None where it did not finish.
        metrics: All that it returned; a program that was ended early, its last figures.
        reason: Why it was pruned or failed.
        seconds: Wall time.
    """

    number: int
    params: dict[str, Any]
    status: Status
    value: float | None = None
    metrics: dict[str, Any] | None = None
    reason: str | None = None
    seconds: float = 0.0


def best(trials: list[Trial], goal: str = "minimize") -> Trial | None:
    """Returns the finished trial with the best value, None if none has finished.

    Example:
        >>> best([Trial(0, {}, "finished", 2.0), Trial(1, {}, "finished", 1.0), Trial(2, {}, "failed")]).number
        1
    """
    done = [trial for trial in trials if trial.value is not None]
    sign = 1 if goal == "minimize" else -1
    return min(done, key=lambda trial: sign * (trial.value or 0.0), default=None)


def search(
    config: Mapping[str, Any],
    train: Train,
    *,
    runs: int | None = None,
    seed: int = 0,
    engine: str = "auto",
    log_path: str | Path | None = None,
    told: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Searches a sweep config's space here and now, with no server and no account.

    Args:
        config: A sweep config. Its `early_terminate` ends programs (`program_of`) by what they print while they run; to
            a function it is not applied, and a warning says so.
        train: Takes the parameters by name and returns the metric, or a mapping with it. What it raises is recorded,
            and the search goes on.
        runs: Most trials; None takes the config's `run_cap`, else 10 (a grid ends by itself).
        seed: Makes the search repeatable.
        engine: `sweeps` (W&B's own search), `optuna`, `built-in` (random or grid; bayes then is random), or `auto`: the
            first of them that is installed.
        log_path: A file of JSON lines, one a trial, written as they end. A full disk costs one warning.
        told: Called with each trial as it ends.

    Returns:
        The trials, in order; see `best`.

    Raises:
        ValueError: The config would be rejected, `engine` is unknown, or `runs` is not positive.
        ImportError: `engine` names a package that is not installed.

    Example:
        >>> config = {"method": "grid", "metric": {"name": "loss"}, "parameters": {"lr": {"values": [0.1, 0.5, 2.0]}}}
        >>> trials = search(config, lambda params: (1 - params["lr"]) ** 2, engine="built-in")
        >>> best(trials).params
        {'lr': 0.5}
    """
    check(config)
    if runs is not None and runs < 1:
        raise ValueError(f"runs={runs!r} must be at least 1")
    stopping = _stopping(config, train)
    asked = make_engine(config, engine, seed)
    most = runs or config.get("run_cap") or (None if config["method"] == "grid" else 10)
    metric = Metric.of(config).name
    trials: list[Trial] = []
    with _lines(log_path) as file:
        while most is None or len(trials) < most:
            params = asked.ask()
            if params is None:
                break
            trial = _run(_judged(train, stopping), len(trials), params, metric)
            asked.tell(trial)
            trials.append(trial)
            if file is not None and not _written(file, trial):
                file = None
            if told is not None:
                told(trial)
    if stopping is not None and len(trials) > 1 and all(len(history) < 2 for history in stopping.histories):
        why = f"no run printed more than one line of JSON with {metric!r}"
        warnings.warn(f"early_terminate had nothing to go by: {why}", stacklevel=2)
    return trials


def _stopping(config: Mapping[str, Any], train: Train) -> Stopping | None:
    """What ends runs early, where the config asks for it and it can be done."""
    if "early_terminate" not in config:
        return None
    if isinstance(train, Program):
        return Stopping.of(config)
    why = "a local search ends programs early, by the figures that they print, and no functions"
    warnings.warn(f"early_terminate is not applied: {why}", stacklevel=3)
    return None


def _judged(train: Train, stopping: Stopping | None) -> Train:
    if stopping is None or not isinstance(train, Program):
        return train
    stopping.begin()
    return functools.partial(train, judge=stopping.judge)


def _run(train: Train, number: int, params: dict[str, Any], metric: str) -> Trial:
    started = time.perf_counter()
    try:
        returned = train(dict(params))
    except Exception as error:
        if is_stop_request(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        return Trial(number, params, "failed", reason=reason, seconds=time.perf_counter() - started)
    seconds = time.perf_counter() - started
    metrics = dict(returned) if isinstance(returned, Mapping) else {metric: returned}
    if metrics.get(PRUNED):
        return Trial(number, params, "pruned", None, metrics, str(metrics[PRUNED]), seconds)
    try:
        value = float(metrics[metric])
    except (KeyError, TypeError, ValueError):
        return Trial(number, params, "failed", None, metrics, f"it returned no number under {metric!r}", seconds)
    if not math.isfinite(value):
        return Trial(number, params, "failed", None, metrics, f"{metric} is {value}", seconds)
    return Trial(number, params, "finished", value, metrics, None, seconds)


@contextmanager
def _lines(path: str | Path | None) -> Iterator[IO[bytes] | None]:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if path is None else open(path, "wb", buffering=0) as file:  # closing has nothing left to write
        yield file


def _written(file: IO[bytes], trial: Trial) -> bool:
    """Writes a line; a full disk costs one warning, and not the trials to come."""
    try:
        file.write(json.dumps(asdict(trial), default=str).encode() + b"\n")
    except OSError as error:
        warnings.warn(f"{file.name}: {error.strerror}: the search goes on, no more trials are written", stacklevel=3)
        return False
    return True


def _reached(trial: Trial, metric: str) -> float | None:
    """The last figure of a pruned trial, None if it has none that is finite: to W&B's search it is a finished run's."""
    figure: Any = (trial.metrics or {}).get(metric)
    return float(figure) if trial.status == "pruned" and is_number(figure) else None


# ---- who proposes


class Engine(Protocol):
    """Proposes parameters and is told what became of them."""

    name: str

    def ask(self) -> dict[str, Any] | None:
        """Returns the next parameters, None when all are through."""

    def tell(self, trial: Trial) -> None:
        """Takes in what became of the parameters that were asked for last."""


def make_engine(config: Mapping[str, Any], engine: str, seed: int) -> Engine:
    """Returns the engine for a valid config.

    Raises:
        ValueError: There is no such engine, or it cannot search this config.
        ImportError: It is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not one of {', '.join(ENGINES)}")
    if config["method"] == "custom" or "parameters" not in config:
        raise ValueError(
            "method: custom is for a scheduler of your own under W&B; a local search is bayes, random or grid"
        )
    for name, made, installed, line in (
        ("sweeps", _Sweeps, wandbs_search() is not None, "safe_lr[search]' && pip install --no-deps 'sweeps>=0.3"),
        ("optuna", _Optuna, importlib.util.find_spec("optuna") is not None, "optuna"),
    ):
        if engine == name and not installed:
            raise ImportError(
                f"engine={engine!r} needs the package {name!r}: pip install '{line}', or take engine='built-in'"
            )
        if engine == name or (engine == "auto" and installed):
            return made(config, seed)
    return _BuiltIn(config, seed)


class _BuiltIn:
    """Random draws, or every point of a grid in order."""

    name = "built-in"

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        self._spaces = {key: space(key, spec) for key, spec in config["parameters"].items()}
        self._stream = random.Random(seed)
        self._grid = _grid_points(self._spaces) if config["method"] == "grid" else None

    def ask(self) -> dict[str, Any] | None:
        if self._grid is not None:
            return next(self._grid, None)
        return {key: choice.draw(self._stream) for key, choice in self._spaces.items()}

    def tell(self, trial: Trial) -> None:
        pass


def _grid_points(spaces: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    axes = []
    for key, choice in spaces.items():
        if isinstance(choice, Choice):
            axes.append(choice.values)
        elif choice.integer or choice.step is not None:
            # As W&B does it: integers to the end, steps without the end.
            step = choice.step or 1
            count = math.ceil((choice.high + choice.integer - choice.low) / step)
            points = [choice.low + step * index for index in range(count)]
            axes.append(tuple(map(round if isinstance(step, int) else float, points)))
        else:
            raise ValueError(f"parameters.{key}: a grid cannot go over a range of floats: give values")
    return (dict(zip(spaces, point, strict=True)) for point in itertools.product(*axes))


class _Sweeps:
    """W&B's own search, the one that its server runs. It draws from global streams, which are put back."""

    name = "sweeps"

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        for key, spec in config["parameters"].items():
            space(key, spec)  # flat names and known distributions only, as with the other engines
        self._config = json.loads(json.dumps(dict(config)))
        self._runs: list[Any] = []
        with _Streams(0):  # thrown away: what it imports at its first call draws from the global streams, too
            self._next()
        self._streams = _Streams(seed)

    def ask(self) -> dict[str, Any] | None:
        with self._streams:
            run = self._next()
        if run is None:
            return None
        run.name = f"t{len(self._runs)}"
        self._runs.append(run)
        return {key: _plain(item["value"]) for key, item in run.config.items()}

    def _next(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import sweeps

            return sweeps.next_run(self._config, self._runs, validate=False)

    def tell(self, trial: Trial) -> None:
        import sweeps

        run, metric = self._runs[-1], Metric.of(self._config).name
        reached = trial.value if trial.value is not None else _reached(trial, metric)
        run.state = sweeps.RunState.finished if reached is not None else sweeps.RunState.failed
        if reached is not None:
            run.summary_metrics = {metric: reached}
            run.history = [run.summary_metrics]


class _Streams:
    """Python's and NumPy's global streams as an own seed left them, for the time of a `with`."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._own: tuple[Any, Any] = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        import numpy as np

        self._theirs = random.getstate(), np.random.get_state()
        random.setstate(self._own[0])
        np.random.set_state(self._own[1])

    def __exit__(self, *error: object) -> None:
        import numpy as np

        self._own = random.getstate(), np.random.get_state()
        random.setstate(self._theirs[0])
        np.random.set_state(self._theirs[1])


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value  # the engine returns NumPy's numbers


class _Optuna:
    """Optuna's tree-structured Parzen estimator for bayes, its random sampler else; grids are our own."""

    name = "optuna"

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        import optuna

        self._spaces = {key: space(key, spec) for key, spec in config["parameters"].items()}
        self._grid = _grid_points(self._spaces) if config["method"] == "grid" else None
        kind = optuna.samplers.TPESampler if config["method"] == "bayes" else optuna.samplers.RandomSampler
        self._metric = Metric.of(config)
        with _quiet():
            self._study = optuna.create_study(direction=self._metric.goal, sampler=kind(seed=seed))
        self._asked: Any = None

    def ask(self) -> dict[str, Any] | None:
        if self._grid is not None:
            return next(self._grid, None)
        with _quiet():
            self._asked = self._study.ask()
            return {key: self._suggest(key, choice) for key, choice in self._spaces.items()}

    def _suggest(self, key: str, choice: Any) -> Any:
        if isinstance(choice, Choice):  # by index: optuna takes plain values only, and knows no weights
            return choice.values[self._asked.suggest_categorical(key, list(range(len(choice.values))))]
        if choice.integer:
            return self._asked.suggest_int(key, round(choice.low), round(choice.high))
        return choice.rounded(self._asked.suggest_float(key, choice.low, choice.high, log=choice.log))

    def tell(self, trial: Trial) -> None:
        import optuna

        if self._asked is None:
            return
        with _quiet():
            reached = _reached(trial, self._metric.name)
            if trial.value is not None:
                self._study.tell(self._asked, trial.value)
            elif reached is not None:
                self._asked.report(reached, step=0)
                self._study.tell(self._asked, state=optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(self._asked, state=optuna.trial.TrialState.FAIL)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna prints a line for each study and trial; its own verbosity is put back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
