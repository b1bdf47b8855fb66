"""Whether a server answers: after an outage only one request at a time finds out."""

from __future__ import annotations

import threading
import time
from typing import Final, Literal, TypeAlias, final

from trainer.retry import growing_pauses

OPEN_AFTER: Final = 5
"""Failed attempts in a row, of all requests together, after which a server counts as down."""
FIRST_PROBE_S: Final = 1.0
LONGEST_PROBE_S: Final = 30.0
"""Bounds of the pauses between the requests that find out whether a server is back."""

State: TypeAlias = Literal["closed", "open", "probe"]


@final
class Circuit:
    """A circuit breaker: closed while the server answers, open while it does not.

    A request that times out opens it at once if nothing was answered since the request began: the server hangs. If
    others were answered meanwhile, only this one request is slow. Other failures open it after `OPEN_AFTER` in a row.
    """

    def __init__(self) -> None:
        """Begin closed."""
        self._lock = threading.Lock()
        self._is_open = self._is_probing = False
        self._opened = self._next_probe = 0.0
        self._last_success = float("-inf")
        self._num_failed = 0
        self._pauses = growing_pauses(FIRST_PROBE_S, LONGEST_PROBE_S)
        self.problem = ""
        """Of the last failed attempt."""

    @property
    def is_open(self) -> bool:
        """Whether the server counts as down."""
        return self._is_open

    def enter(self) -> State:
        """What a request is to do: go on, not try, or try as the only one."""
        with self._lock:
            if not self._is_open:
                return "closed"
            if self._is_probing or time.monotonic() < self._next_probe:
                return "open"
            self._is_probing = True
            return "probe"

    def answered_since(self, began: float) -> bool:
        """Whether any request was answered since then, by `time.monotonic()`."""
        return self._last_success > began

    def succeeded(self) -> float:
        """A request was answered; returns for how many seconds the circuit was open."""
        with self._lock:
            self._last_success = time.monotonic()
            was_open_s = self._last_success - self._opened if self._is_open else 0.0
            self._is_open = self._is_probing = False
            self._num_failed = 0
            self._pauses = growing_pauses(FIRST_PROBE_S, LONGEST_PROBE_S)
            return was_open_s

    def failed(self, began: float, problem: str, *, is_down: bool, least_pause_s: float = 0.0) -> bool:
        """An attempt failed; returns whether this opened the circuit.

        Args:
            began: when, by `time.monotonic()`.
            problem: shown to people.
            is_down: it got no answer in time, or was the last attempt of its request.
            least_pause_s: when the server asked to be asked again.
        """
        with self._lock:
            self.problem = problem
            self._num_failed += 1
            was_open, self._is_probing = self._is_open, False
            is_new = not was_open and self._last_success < began and (is_down or self._num_failed >= OPEN_AFTER)
            if is_new:
                self._is_open, self._opened = True, time.monotonic()
            if was_open or is_new:
                self._next_probe = time.monotonic() + max(next(self._pauses), least_pause_s)
            return is_new

    def release(self) -> None:
        """A probe ended without telling whether the server answers."""
        with self._lock:
            self._is_probing = False
