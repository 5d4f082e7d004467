"""Calls into somebody else's service: they may hang, and a stop request may arrive while they run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def is_stop_request(error: BaseException) -> bool:
    """Whether `error` is a request to end training and must be raised on by whoever catches `Exception`.

    A W&B sweep agent stops a run by putting a bare `Exception()` into the thread that trains. It can surface in any
    line, also inside a logger, and a broad `except` would keep the run alive against its owner's will.

    Args:
        error: What was caught.

    Returns:
        True for an `Exception` of no subclass and without arguments.

    Example:
        >>> is_stop_request(Exception()), is_stop_request(Exception("disk full")), is_stop_request(OSError())
        (True, False, False)
    """
    return type(error) is Exception and not error.args


def bounded(call: Callable[[], T], timeout: float, what: str) -> T:
    """Returns `call()`, for which the caller waits `timeout` seconds at most.

    The call runs in a daemon thread, so that one which never returns holds up neither the caller nor the
    interpreter's exit. It is not ended at the timeout, only waited for no longer.

    Args:
        call: Takes nothing.
        timeout: Longest wait, in seconds.
        what: Names the call in the error.

    Returns:
        What `call` returns.

    Raises:
        TimeoutError: The call was not over in time.
        Exception: Whatever the call raised. `SystemExit` and its like come out as `RuntimeError`: a service may fail,
            but it may not end the process.

    Example:
        >>> bounded(lambda: 6 * 7, timeout=5.0, what="answer")
        42
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 (handed to the caller below)
            errors.append(error)

    thread = threading.Thread(target=work, name=f"safe_lr {what}", daemon=True)
    thread.start()
    thread.join(timeout)
    if errors:
        error = errors[0]
        if isinstance(error, Exception):
            raise error
        raise RuntimeError(f"{what} ended with {type(error).__name__}: {error}") from error
    if not results:
        raise TimeoutError(f"{what} took longer than {timeout:.3g} s")
    return results[0]
