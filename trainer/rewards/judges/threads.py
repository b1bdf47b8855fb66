"""Threads that wait for servers, and that no exit of the process waits for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import TypeAlias, final

from trainer.rewards.call_result import CallResult

Call: TypeAlias = Callable[[], list[CallResult]]


@final
class Threads:
    """A pool of daemon threads; that of `concurrent.futures` is joined at exit, behind a request that hangs."""

    def __init__(self, number: int, name: str) -> None:
        """Start no thread before the first call.

        Args:
            number: of threads.
            name: shown in stacks.
        """
        self._number, self._name = number, name
        self._calls: queue.SimpleQueue[tuple[Call, Future[list[CallResult]]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_started = 0
        self._is_cancelled = False
        self._pending: set[Future[list[CallResult]]] = set()

    def submit(self, call: Call) -> Future[list[CallResult]]:
        """Queue a call."""
        future: Future[list[CallResult]] = Future()
        with self._lock:
            if self._is_cancelled:
                future.cancel()
                return future
            self._pending.add(future)
            if self._num_started < self._number:
                self._num_started += 1
                threading.Thread(target=self._work, daemon=True, name=f"{self._name}-{self._num_started}").start()
        self._calls.put((call, future))
        return future

    def cancel(self) -> None:
        """Cancel all calls, and later ones; who waits for one that has begun waits no longer."""
        with self._lock:
            self._is_cancelled = True
            for future in self._pending:
                if not future.cancel():
                    with suppress(InvalidStateError):  # it has just ended
                        future.set_exception(CancelledError())

    def _work(self) -> None:
        while True:
            call, future = self._calls.get()
            if future.set_running_or_notify_cancel():
                with suppress(InvalidStateError):  # cancelled meanwhile
                    try:
                        future.set_result(call())
                    except InvalidStateError:
                        raise
                    except BaseException as error:
                        future.set_exception(error)
            with self._lock:
                self._pending.discard(future)
