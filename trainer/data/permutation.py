"""Permutations of row numbers that are computed one element at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

NUM_ROUNDS: Final = 6
"""Of the Feistel network; 4 rounds of a pseudorandom function make a pseudorandom permutation (Luby and Rackoff)."""


@final
@dataclass(frozen=True)
class Permutation:
    """A pseudorandom order of 0 .. size - 1: any element in constant time and memory, without a list of the others.

    A Feistel network permutes the numbers below the next power of 4; a number that is too large is permuted again
    until it is small enough, at most 4 times on average ("cycle walking", Black and Rogaway 2002).

    >>> order = Permutation("rows:7:0", 5)
    >>> list(order) == [order.at(position) for position in range(5)], sorted(order)
    (True, [0, 1, 2, 3, 4])
    """

    name: str
    """Key of the permutation: equal names and sizes give equal orders."""
    size: int

    def at(self, position: int) -> int:
        """The element at a position below `size`."""
        half = self._half_bits
        value = self._permuted(position, half)
        while value >= self.size:
            value = self._permuted(value, half)
        return value

    def __iter__(self) -> Iterator[int]:
        return (self.at(position) for position in range(self.size))

    @property
    def _half_bits(self) -> int:
        return max(1, ((self.size - 1).bit_length() + 1) // 2)

    def _permuted(self, value: int, half: int) -> int:
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for number in range(NUM_ROUNDS):
            digest = hashlib.blake2b(f"{self.name}:{number}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        return left << half | right
