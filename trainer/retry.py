"""Retries an operation whose failure may be temporary."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TypeVar

T = TypeVar("T")


def retry(
    operation: Callable[[], T],
    *,
    pauses_s: Iterable[float],
    is_transient: Callable[[Exception], bool],
    least_pause_s: Callable[[Exception], float] = lambda _: 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call an operation until it succeeds; the error of the last call is raised.

    Args:
        operation: what to call.
        pauses_s: seconds to wait before each further call; (1, 2, 4) allows four calls.
        is_transient: whether to call again after this error; any other error is raised at once.
        least_pause_s: what an error says how long to wait at least, such as a server's `Retry-After`.
        sleep: waits; it may raise, which ends the attempts.
    """
    for pause_s in pauses_s:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            least_s = least_pause_s(error)
        sleep(max(pause_s, least_s))
    return operation()


def growing_pauses(first_s: float, longest_s: float, number: int | None = None) -> Iterator[float]:
    """Random pauses below a bound that doubles, so that many clients do not return at the same moment.

    >>> pauses = list(growing_pauses(1.0, 3.0, 3))
    >>> [bound / 2 <= pause <= bound for pause, bound in zip(pauses, (1.0, 2.0, 3.0))]
    [True, True, True]

    Args:
        first_s: bound of the first pause.
        longest_s: bound of every later one at most.
        number: of pauses; None gives them without end.
    """
    bound_s = first_s
    for _ in repeat(None) if number is None else repeat(None, number):
        yield random.uniform(bound_s / 2, bound_s)
        bound_s = min(longest_s, 2 * bound_s)
