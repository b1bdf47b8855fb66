"""Keys that a server has checked lately: requests go on for a while when the store is down."""

from __future__ import annotations

import asyncio
from time import monotonic, time
from typing import Final, final

from trainer.control.keys import KEY, Key, digest_of, find_key
from trainer.control.store import Store, StoreDownError

FRESH_S: Final = 2.0
"""For this long a key is not looked up again; a revoked key is refused after it."""
CACHE_S: Final = 30.0
"""For this long a checked key is accepted while the store is down."""
MAX_CACHED: Final = 10_000


@final
class KeyCache:
    """Looks keys up, and remembers valid ones by their digest. Belongs to one event loop."""

    def __init__(self, store: Store, *, fresh_s: float = FRESH_S, cache_s: float = CACHE_S) -> None:
        """Begin empty.

        Args:
            store: is asked.
            fresh_s: how long an answer is used without asking again.
            cache_s: how long a key is accepted when the store does not answer.
        """
        self._store, self._fresh_s, self._cache_s = store, fresh_s, cache_s
        self._known: dict[str, tuple[float, Key]] = {}
        self._asked_down = float("-inf")

    async def find(self, key: str) -> Key | None:
        """The key that a client sent; None where there is no such key.

        Raises:
            StoreDownError: the store does not answer, and the key was not checked lately.
        """
        if KEY.fullmatch(key) is None:
            return None
        digest, now = digest_of(key), monotonic()
        checked, known = self._known.get(digest, (float("-inf"), None))
        if known is not None and now - checked < self._fresh_s:
            return known
        is_spare = known is not None and now - checked < self._cache_s
        if known is not None and is_spare and now - self._asked_down < self._fresh_s:
            return known  # it was down a moment ago: a store that lets each request wait would slow all of them
        try:
            found = await asyncio.to_thread(find_key, self._store, key)
        except StoreDownError:
            self._asked_down = monotonic()
            if known is not None and is_spare:
                return known
            raise
        self._known.pop(digest, None)
        if found is not None and found.problem(time()) is None:
            if len(self._known) >= MAX_CACHED:
                self._known.pop(next(iter(self._known)))
            self._known[digest] = (now, found)
        return found

    def forget(self) -> None:
        """Look every key up again, after this process changed one."""
        self._known.clear()
