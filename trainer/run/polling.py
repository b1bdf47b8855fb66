"""Wait by polling: regular pauses up to a timeout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator


def pauses(pause_s: float, timeout_s: float) -> Iterator[float]:
    """Equal pauses for `trainer.retry`, until a timeout that starts with the first of them."""
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
