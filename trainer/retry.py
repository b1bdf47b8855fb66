"""Retry what fails for a moment; wait until a condition holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def retry(operation: Callable[[], T], *, is_transient: Callable[[Exception], bool], pauses_s: Iterable[float]) -> T:
    """Call an operation until it succeeds, fails for good, or the pauses run out.

    >>> answers = iter([OSError("busy"), "done"])
    >>> def ask() -> str:
    ...     if isinstance(answer := next(answers), OSError):
    ...         raise answer
    ...     return answer
    >>> retry(ask, is_transient=lambda error: isinstance(error, OSError), pauses_s=backoff(0.001, 3))
    'done'

    Args:
        operation: called at least once.
        is_transient: whether another call may succeed after this error; other errors propagate at once.
        pauses_s: seconds to wait before each further call: `backoff(...)` or `regular(...)`. The error of the last
            call propagates.
    """
    for pause_s in pauses_s:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(pause_s)
    return operation()


def backoff(first_s: float, number: int) -> Iterator[float]:
    """Pauses that double.

    >>> list(backoff(0.5, 3))
    [0.5, 1.0, 2.0]
    """
    return (first_s * 2**index for index in range(number))


def regular(pause_s: float, timeout_s: float) -> Iterator[float]:
    """Equal pauses until the timeout, which starts with the first of them."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        yield pause_s


def wait_until(condition: Callable[[], bool], *, timeout_s: float, poll_s: float) -> bool:
    """Wait for a condition; returns whether it came true in time.

    Args:
        condition: checked at least once.
        timeout_s: seconds; `float("inf")` waits forever.
        poll_s: seconds between two checks.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(poll_s)
    return True
