"""Random draws that are the same on every Python version.

Python guarantees this only for `random.random()`, not for `choice`, `sample` and `shuffle`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar, final

T = TypeVar("T")


@final
class Draws:
    """A seeded source of choices."""

    def __init__(self, seed: str) -> None:
        """Seed the draws with a text."""
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random() < probability

    def between(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, values: Sequence[T]) -> T:
        """Return one of the values."""
        return values[int(self._random() * len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """Return the values in another order."""
        keyed = [(self._random(), index) for index in range(len(values))]
        return [values[index] for _, index in sorted(keyed)]
