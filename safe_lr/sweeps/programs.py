"""The program that a sweep runs: as a script with arguments, or as a function."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safe_lr.sweeps.config import COMMAND
from safe_lr.sweeps.pruning import PRUNED

GRACE = 10.0
"""Seconds that a program has to end in when it is asked to."""


def load_function(target: str) -> Callable[..., Any]:
    """Imports `module:function`; the module may lie in the working directory, or be a file `path/to/script.py`.

    Raises:
        ValueError: The text has not that form, or there is no such module or function.

    Example:
        >>> load_function("math:sqrt")(4.0)
        2.0
    """
    module, colon, name = target.rpartition(":")
    if not (module and colon and name):
        raise ValueError(f"{target!r} is not module:function, such as train:make or examples/sweep.py:train")
    path = Path(module)
    folder, dotted = (str(path.parent), path.stem) if path.suffix == ".py" else (".", module)
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        found = getattr(importlib.import_module(dotted), name)
    except ModuleNotFoundError as error:
        if error.name != dotted.split(".")[0] and error.name != dotted:
            raise ValueError(f"{module} needs {error.name}, which is not installed") from error
        raise ValueError(f"there is no module {module!r} here ({Path.cwd()})") from error
    except AttributeError as error:
        raise ValueError(f"{module} has no {name!r}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ValueError(f"{target} is {found!r}, which is not a function")
    return found  # type: ignore[no-any-return]


def switches(params: Mapping[str, Any]) -> list[str]:
    """Returns a run's parameters as arguments, as `${args_no_boolean_flags}` writes them.

    Example:
        >>> switches({"lr": 0.1, "safe_lr.follow_limit": True, "verbose": False})
        ['--lr=0.1', '--safe_lr.follow_limit']
    """
    shown = {key: value for key, value in params.items() if value is not False}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in shown.items()]


def command_line(config: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """Returns the command that a W&B agent would start for these parameters.

    Args:
        config: A sweep config with a `program`, or with a `command` that needs none.
        params: The run's parameters.

    Raises:
        ValueError: There is no program, or the command uses a macro that is not known.

    Example:
        >>> params = {"lr": 0.1, "safe_lr.follow_limit": True, "verbose": False}
        >>> command_line({"program": "train.py"}, params)[-3:]
        ['train.py', '--lr=0.1', '--safe_lr.follow_limit']
    """
    words: list[str] = []
    macros: dict[str, Sequence[str]] = {
        "${env}": [],  # /usr/bin/env: the interpreter below is named by its path
        "${interpreter}": [sys.executable],
        "${args_no_boolean_flags}": switches(params),
        "${args}": [f"--{key}={value}" for key, value in params.items()],
        "${args_no_hyphens}": [f"{key}={value}" for key, value in params.items()],
        "${args_no_equals}": [word for key, value in params.items() for word in (f"--{key}", str(value))],
        "${args_append_hydra}": [f"+{key}={value}" for key, value in params.items()],
        "${args_override_hydra}": [f"++{key}={value}" for key, value in params.items()],
        "${args_json}": [json.dumps(dict(params))],
    }
    for word in config.get("command", COMMAND):
        if word == "${program}":
            if "program" not in config:
                raise ValueError("program: the config names none: write program: train.py, or give a function")
            words.append(str(config["program"]))
        elif word in macros:
            words += macros[word]
        elif str(word).startswith("${"):
            raise ValueError(f"command: {word!r} is not known here: use {', '.join(('${program}', *macros))}")
        else:
            words.append(str(word))
    return words


class Program:
    """A config's program as a function of its parameters; `program_of` makes it.

    It runs with W&B switched off (WANDB_MODE=disabled), unless the environment says otherwise, and in a session of its
    own, so that what it has started can be ended with it.
    """

    def __init__(self, config: Mapping[str, Any], folder: str | Path) -> None:
        self._config, self._folder = config, folder

    def __call__(
        self, params: dict[str, Any], judge: Callable[[dict[str, Any]], str | None] | None = None
    ) -> dict[str, Any]:
        """Returns the program's figures: its last line that is a JSON object.

        Args:
            params: What it runs with.
            judge: Called with the figures of each such line as it comes. Where it returns a reason the program is
                ended with all that it has started, and its figures are its last ones and, as `safe_lr_pruned`, that
                reason.

        Raises:
            RuntimeError: The program failed.
        """
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        environment.setdefault("WANDB_MODE", "disabled")
        if judge is not None:  # Python keeps what it prints into a pipe until there are 8 KB of it
            environment.setdefault("PYTHONUNBUFFERED", "1")
        with (
            tempfile.TemporaryFile("w+", errors="replace") as complaints,
            subprocess.Popen(
                command_line(self._config, params),
                cwd=self._folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                start_new_session=True,
            ) as process,
        ):
            printed: list[str] = []
            try:
                for line in process.stdout or ():
                    printed.append(line)
                    figures = last_figures(line)
                    reason = None if judge is None else judge(figures)
                    if reason is not None:
                        _end(process)
                        return {**figures, PRUNED: reason}
                status = process.wait()
            except BaseException:  # Ctrl-C among them, which reaches no other session: the program must not outlive us
                _end(process)
                raise
            complaints.seek(0)
            said = "".join(printed)
            if status:
                last = (complaints.read() or said).strip().splitlines()[-1:] or ["it printed nothing"]
                raise RuntimeError(
                    f"{self._config.get('program', 'the command')} ended with status {status}: {last[0]}"
                )
        return last_figures(said)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a program and all of its group, a shell's or launcher's children among them: asked first, then killed."""
    try:
        _signal(process, kill=False)
        until = time.monotonic() + GRACE
        while _lives(process) and time.monotonic() < until:
            time.sleep(0.02)
    finally:  # a second Ctrl-C comes out of the wait
        _signal(process, kill=True)


def _signal(process: subprocess.Popen[str], *, kill: bool) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    elif kill:
        process.kill()
    else:
        process.terminate()


def _lives(process: subprocess.Popen[str]) -> bool:
    """Whether the program or anything of its group does."""
    if process.poll() is None:
        return True
    try:
        os.killpg(process.pid, 0)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows has no groups; macOS forbids dead ones
        return False
    return True


def program_of(config: Mapping[str, Any], *, folder: str | Path = ".") -> Program:
    """Returns a function that runs the config's program for given parameters and reads its figures.

    The program prints its figures as its last line that is a JSON object: `{"val_loss": 0.31}`. Where the config has
    `early_terminate`, `search` goes by such lines while it runs.

    Args:
        config: A sweep config with a `program`.
        folder: Where the program runs.

    Raises:
        ValueError: There is no program. The function itself raises `RuntimeError` where the program fails.
    """
    command_line(config, {})  # what is wrong is said before anything runs
    if "${program}" in config.get("command", COMMAND) and not (Path(folder) / config["program"]).is_file():
        raise ValueError(f"program: there is no file {config['program']!r} in {Path(folder).resolve()}")
    return Program(config, folder)


def last_figures(printed: str) -> dict[str, Any]:
    """Returns the last line that is a JSON object, an empty dict where there is none.

    Example:
        >>> last_figures('epoch 1\\n{"val_loss": 0.4}\\n{"val_loss": 0.3}\\nbye')
        {'val_loss': 0.3}
    """
    for line in reversed(printed.splitlines()):
        if line.lstrip().startswith("{"):
            try:
                figures = json.loads(line)
            except ValueError:
                continue
            if isinstance(figures, dict):
                return figures
    return {}
