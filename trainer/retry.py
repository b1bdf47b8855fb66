"""Retries an operation whose failure may be temporary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def retry(operation: Callable[[], T], *, pauses_s: Iterable[float], is_transient: Callable[[Exception], bool]) -> T:
    """Call an operation until it succeeds; the error of the last call is raised.

    Args:
        operation: what to call.
        pauses_s: seconds to wait before each further call; (1, 2, 4) allows four calls.
        is_transient: whether to call again after this error; any other error is raised at once.
    """
    for pause_s in pauses_s:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(pause_s)
    return operation()
