"""Makes items in a thread beside the training, a few before they are needed; for the loops' packs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar, final

import torch

T = TypeVar("T")

AHEAD: Final = 2
"""Items that are made but not used yet."""
_POLL_S: Final = 0.1
"""How often a thread that waits for room looks whether it should end."""
_CLOSE_S: Final = 10.0


@final
class _Failed:
    """An exception of the thread, on its way to the consumer."""

    def __init__(self, error: BaseException) -> None:
        """Keep it."""
        self.error = error


@final
class _End:
    """There are no more items."""


@final
class Prefetched(Generic[T]):
    """An iterator over items that a thread makes; what makes them must not depend on what is done with earlier ones.

    The thread touches no collective: ranks would call them in different orders.
    """

    def __init__(self, items: Iterator[T], prepare: Callable[[], None] = lambda: None) -> None:
        """Start the thread.

        Args:
            items: made in the thread.
            prepare: called first in the thread, which has none of this thread's settings.
        """
        self._queue: queue.Queue[T | _Failed | _End] = queue.Queue(maxsize=AHEAD)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(items, prepare), name="packs", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item.

        Raises:
            StopIteration: there are no more.
        """
        item = self._queue.get()
        if isinstance(item, _Failed):
            self._is_closed.set()
            raise item.error
        if isinstance(item, _End):
            self._queue.put(item)
            raise StopIteration
        return item

    def close(self) -> None:
        """End the thread; items that were made and not used are dropped."""
        self._is_closed.set()
        self._thread.join(_CLOSE_S)  # a read from a file system that hangs does not hold up the end of the run

    def _make(self, items: Iterator[T], prepare: Callable[[], None]) -> None:
        try:
            prepare()
            for item in items:
                if not self._put(item):
                    return
            self._put(_End())
        except BaseException as error:  # raised again where the item is needed
            self._put(_Failed(error))

    def _put(self, item: T | _Failed | _End) -> bool:
        """Hand an item on; False if nobody wants it any more."""
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False


def prefetched(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """The items, for a GPU made ahead in a thread (`Prefetched`), elsewhere when they are asked for.

    On a CPU a thread would compete with the training for the cores. Close the iterator at the end.

    Args:
        items: a generator.
        device: of the training.
    """
    if device.type != "cuda":
        return items
    return Prefetched(items, lambda: torch.cuda.set_device(device))
