"""`safe-lr sweep`: a sweep's config written, and the sweep run, here or under W&B."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safe_lr.commands.parsers import NEGATIVE, add_command, as_json, naming, positive

NO_WANDB = "this needs W&B: pip install wandb, or search without it: safe-lr sweep run --local"

_ADDRESS = "give ENTITY/PROJECT/ID, as it stands in the sweep's address (`safe-lr sweep run SWEEP.yaml` makes a sweep)"


def add(commands: Any) -> None:
    """Adds the command and its three parts."""
    parser = commands.add_parser(
        "sweep",
        help="write a sweep's config; run it with or without W&B",
        description="Sweeps over margin and other settings that carry over between models, or over lr.",
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_init(parts)
    _add_run(parts)
    _add_agent(parts)


def _add_init(parts: Any) -> None:
    init = add_command(
        parts,
        "init",
        _init,
        brief="write the YAML",
        about="Writes a config that W&B takes. Without --lr it sweeps the margin, with lr following the limit: no lr\n"
        "is to be chosen. A range is LOW:HIGH, several values are A,B,C.",
        examples=(
            "sweep init --program train.py -o sweep.yaml",
            "sweep init --lr 1e-4:1 --schedule constant,cosine --method random -o lr.yaml",
        ),
    )
    for name, text in (
        ("lr", "space of lr"),
        ("margin", "space of the margin, in (0, 1]"),
        ("bound", "momentum, coherence, lemma1"),
        ("schedule", "names that your program knows"),
        ("beta1", "space of the first decay"),
        ("beta2", "space of the second decay"),
    ):
        init.add_argument(f"--{name}", type=_space, metavar="SPACE", help=text)
    init.add_argument("--method", choices=("bayes", "random", "grid"), default="bayes")
    init.add_argument("--metric", default="val_loss", help="the figure to judge by (default val_loss)")
    init.add_argument("--goal", choices=("minimize", "maximize"), default="minimize")
    init.add_argument("--program", help="the script that is swept; it gets --name=value arguments")
    init.add_argument("--name", help="the sweep's name")
    init.add_argument("--runs", type=positive, help="most runs")
    init.add_argument("-o", "--out", type=Path, metavar="YAML", help="where to write it (default: standard output)")


def _add_run(parts: Any) -> None:
    run = add_command(
        parts,
        "run",
        _run,
        brief="run a sweep, --local without W&B",
        about="Runs a sweep. With --local it searches in this process, without server or account: by W&B's own search\n"
        "(package sweeps) or optuna where one is installed, else at random or over a grid. Without --local it makes a\n"
        "W&B sweep and works as its agent.\n\n"
        'A program gets its settings as arguments and prints its figures as a line of JSON: {"val_loss": 0.3}. One\n'
        "that prints such a line now and then is subject to the config's early_terminate. A function gets them as a\n"
        "dict and returns the figures. Exit status 1: no run has finished.",
        examples=(
            "sweep run --local sweep.yaml --runs 20",
            "sweep run --local sweep.yaml --function train.py:train --json",
        ),
    )
    run.add_argument("config", type=Path, metavar="YAML")
    run.add_argument("--local", action="store_true", help="no server, no account")
    run.add_argument("--function", metavar="MODULE:FUNCTION", help="call this instead of the config's program")
    run.add_argument("--runs", type=positive, help="most runs (default: the config's run_cap, else 10)")
    run.add_argument("--engine", choices=("auto", "sweeps", "optuna", "built-in"), default="auto", help="with --local")
    run.add_argument("--seed", type=int, default=0, help="with --local: makes the search repeatable")
    run.add_argument("-o", "--out", type=Path, metavar="JSONL", help="with --local: write the trials there")
    run.add_argument("--project", help="without --local: the W&B project")
    run.add_argument("--json", action="store_true", help="with --local: print the answer as JSON, and nothing else")


def _add_agent(parts: Any) -> None:
    agent = add_command(
        parts,
        "agent",
        _agent,
        brief="work for a W&B sweep",
        about="Runs what a W&B sweep asks for: its program as `wandb agent` does, or a function of yours, which finds\n"
        "its settings in wandb.config after wandb.init().",
        examples=("sweep agent team/project/abc123 --count 8", "sweep agent abc123 --function train.py:under_wandb"),
    )
    agent.add_argument("sweep", metavar="ID", help="the sweep: ID, PROJECT/ID or ENTITY/PROJECT/ID")
    agent.add_argument("--function", metavar="MODULE:FUNCTION", help="call this for each run")
    agent.add_argument("--count", type=positive, help="most runs of this agent")


def _space(text: str) -> Any:
    """Reads LOW:HIGH as a range, A,B,C as a list, anything else as one value.

    Example:
        >>> _space("1e-4:1"), _space("momentum,coherence"), _space("0.5")
        ((0.0001, 1.0), ['momentum', 'coherence'], 0.5)
    """
    if ":" in text:
        low, _, high = text.partition(":")
        try:
            return float(low), float(high)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no range LOW:HIGH of numbers") from None
    return [_value(part) for part in text.split(",")] if "," in text else _value(text)


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _init(args: argparse.Namespace) -> None:
    from safe_lr.sweeps import dump_config, sweep_config

    names = (
        "lr",
        "margin",
        "bound",
        "schedule",
        "beta1",
        "beta2",
        "method",
        "metric",
        "goal",
        "program",
        "name",
        "runs",
    )
    text = dump_config(sweep_config(**{name: getattr(args, name) for name in names}))
    if args.out is None:
        print(text, end="")
        return
    with naming(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    print(f"The config is in {args.out}; next: safe-lr sweep run --local {args.out}")


def _run(args: argparse.Namespace) -> int:
    from safe_lr.sweeps import load_config, load_function

    if (args.json or args.out) and not args.local:
        raise ValueError("--json and --out go with --local: of a sweep under W&B, W&B keeps the runs")
    config = load_config(args.config)
    function = load_function(args.function) if args.function else None
    return _run_locally(args, config, function) if args.local else _run_under_wandb(args, config, function)


def _run_locally(args: argparse.Namespace, config: dict[str, Any], function: Callable[..., Any] | None) -> int:
    from safe_lr.sweeps import program_of, search

    trials: list[Any] = []

    def tell(trial: Any) -> None:
        trials.append(trial)
        value = f"{trial.value:.6g}" if trial.value is not None else f"{trial.status}: {trial.reason}"
        settings = "  ".join(f"{name}={_short(setting)}" for name, setting in trial.params.items())
        print(f"run {trial.number:>3}  {value:<12}  {settings}", flush=True)

    quiet = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    settings = {"runs": args.runs, "seed": args.seed, "engine": args.engine, "log_path": args.out}
    try:
        with quiet:
            search(config, function or program_of(config), told=tell, **settings)
    except KeyboardInterrupt:  # what was found so far is an answer, too
        _tell_best(trials, config, args)
        raise
    return _tell_best(trials, config, args)


def _tell_best(trials: list[Any], config: dict[str, Any], args: argparse.Namespace) -> int:
    from safe_lr.sweeps import best
    from safe_lr.sweeps.metric import Metric
    from safe_lr.sweeps.programs import switches

    winner = best(trials, Metric.of(config).goal)
    if args.json:
        print(as_json({"best": winner and asdict(winner), "trials": [asdict(trial) for trial in trials]}))
    elif winner is None:
        print("no run has finished")
    else:
        print(f"best: run {winner.number}, {winner.value:.6g} with {shlex.join(switches(winner.params))}")
    return NEGATIVE if winner is None else 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run_under_wandb(args: argparse.Namespace, config: dict[str, Any], function: Callable[..., Any] | None) -> int:
    with _wandb_errors():
        import wandb

        sweep = wandb.sweep(config, project=args.project or config.get("project") or "safe-lr")
    where = "/".join(
        part for part in (config.get("entity"), args.project or config.get("project") or "safe-lr") if part
    )
    return _work(f"{where}/{sweep}", function, args.runs or config.get("run_cap"))


def _agent(args: argparse.Namespace) -> int:
    from safe_lr.sweeps import load_function

    function = load_function(args.function) if args.function else None
    _find(args.sweep)
    return _work(args.sweep, function, args.count)


def _find(sweep: str) -> None:
    """Raises where there is no such sweep, of which W&B's agents tell in a traceback, in passing, or with status 0."""
    parts = sweep.split("/")
    if len(parts) > 3 or not all(parts):
        raise ValueError(f"{sweep!r} names no sweep: {_ADDRESS}")
    with _wandb_errors():
        import wandb

        try:
            api: Any = wandb.Api()
            api.sweep(sweep)
        except wandb.errors.AuthenticationError:
            raise
        except wandb.errors.CommError as error:
            if not any(text in str(error) for text in ("not find", "not found", "Invalid path")):
                raise
            at = wandb.setup().settings.base_url
            raise ValueError(f"there is no sweep {sweep!r} at {at} ({error}): {_ADDRESS}") from error


def _work(sweep: str, function: Callable[..., Any] | None, count: int | None) -> int:
    """Works as an agent; the status is 1 where runs were made and all of them failed, 2 where W&B's agent did."""
    with _wandb_errors():
        import wandb

        if function is not None:
            failed: list[bool] = []
            wandb.agent(sweep, function=_noted(function, failed), count=count)
            return NEGATIVE if failed and all(failed) else 0
    # W&B's own command ends with 0 whatever became of the runs.
    command = [sys.executable, "-m", "safe_lr.sweeps.agent", *(["--count", str(count)] if count else []), sweep]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    # The agent starts the program by `python`: that is to be this one, also where its environment is not activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return subprocess.run(command, env=environment, check=False).returncode


def _noted(function: Callable[[], Any], failed: list[bool]) -> Callable[[], Any]:
    """Calls the function, and notes whether it failed; being stopped by the sweep is no failure."""
    from safe_lr.loggers import is_stop_request

    def call() -> Any:
        try:
            returned = function()
        except BaseException as error:
            failed.append(not is_stop_request(error))
            raise
        failed.append(False)
        return returned

    return call


@contextlib.contextmanager
def _wandb_errors() -> Iterator[None]:
    """Turns W&B's errors into ours: one line, exit status 2."""
    try:
        yield
    except ImportError as error:
        raise ValueError(NO_WANDB) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        raise ValueError(f"W&B: {error}") from error
