"""Calls into somebody else's service: they may hang, and a stop request may arrive while they run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

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


class Begun(Generic[T]):
    """A call that has begun, in a daemon thread: one that never returns holds up neither its caller nor the exit.

    Args:
        call: Takes nothing.
        what: Names the call in the error.

    Example:
        >>> both = [Begun(lambda: 6 * 7, "answer"), Begun(lambda: 6 + 7, "sum")]
        >>> [call.result(timeout=5.0) for call in both]
        [42, 13]
    """

    def __init__(self, call: Callable[[], T], what: str) -> None:
        self._call, self._what = call, what
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, name=f"safe_lr {what}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 (handed to the caller by `result`)
            self._errors.append(error)

    def result(self, timeout: float) -> T:
        """Returns what the call returns, for which it waits `timeout` seconds at most.

        Raises:
            TimeoutError: The call was not over in time. It is not ended, only waited for no longer.
            Exception: Whatever the call raised. `SystemExit` and its like come out as `RuntimeError`: a service may
                fail, but it may not end the process.
        """
        self._thread.join(timeout)
        if self._errors:
            error = self._errors[0]
            if isinstance(error, Exception):
                raise error
            raise RuntimeError(f"{self._what} ended with {type(error).__name__}: {error}") from error
        if not self._results:
            raise TimeoutError(f"{self._what} took longer than {timeout:.3g} s")
        return self._results[0]


def bounded(call: Callable[[], T], timeout: float, what: str) -> T:
    """Returns `call()`, for which the caller waits `timeout` seconds at most; see `Begun`.

    Example:
        >>> bounded(lambda: 6 * 7, timeout=5.0, what="answer")
        42
    """
    return Begun(call, what).result(timeout)
