"""The paged key-value store: a budget of pages, shared prefixes, and which pages may be reused."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, final

import torch

PAGE: Final = 32
"""Tokens of a page. Gathering and multiplying pages of 16, 32, 64 tokens took 118, 92, 89 us a layer (8 rows)."""


def prefix_keys(owner: bytes, token_ids: Sequence[int]) -> Iterator[bytes]:
    """A digest for each full page of a sequence: of its owner and of all tokens up to the end of the page.

    Args:
        owner: digest of the adapter, so that no page is shared between adapters or versions of one.
        token_ids: of the sequence.
    """
    key = owner
    for start in range(0, len(token_ids) - PAGE + 1, PAGE):
        key = hashlib.blake2b(key + array("q", token_ids[start : start + PAGE]).tobytes(), digest_size=16).digest()
        yield key


@final
class PagePool:
    """Keys and values of all layers in pages of `PAGE` tokens, and their owners."""

    def __init__(self, layers: int, kv_heads: int, width: int, num_pages: int, dtype: torch.dtype) -> None:
        """Reserve the pages.

        Args:
            layers: of the model.
            kv_heads: heads of keys and values.
            width: components of a key.
            num_pages: the budget.
            dtype: of keys and values.
        """
        self.num_pages = num_pages
        self.keys = [torch.zeros(num_pages, kv_heads, width, PAGE, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(num_pages, kv_heads, PAGE, width, dtype=dtype) for _ in range(layers)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages that hold a known prefix and that no sequence uses; the least recently used first."""

    @property
    def num_available(self) -> int:
        """Pages that a sequence can get now."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that sequences use now."""
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages that hold a known prefix."""
        return len(self._page_of)

    def take(self) -> int | None:
        """A page for new tokens; None where the budget is spent."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def has(self, key: bytes) -> bool:
        """Whether a page holds this prefix."""
        return key in self._page_of

    def share(self, key: bytes) -> int | None:
        """The page with this prefix, used once more; None where there is none."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] += 1
        return page

    def keep(self, page: int, key: bytes) -> None:
        """Remember that a page, which is full, holds a prefix; of two equal pages the first is remembered."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Give up pages; those of a known prefix stay until their place is needed, the last ones first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)
