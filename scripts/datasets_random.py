"""Random draws that are the same on every Python version.

Only `random.random()` is promised to be stable across versions; `choice`, `sample` and `shuffle` are not.
"""

import random


class Draws:
    """A seeded source of choices."""

    def __init__(self, seed):
        self._random = random.Random(seed).random

    def chance(self, probability):
        """Return True with this probability."""
        return self._random() < probability

    def between(self, low, high):
        """Return a whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, values):
        """Return one of the values."""
        return values[int(self._random() * len(values))]

    def shuffled(self, values):
        """Return the values in another order."""
        keyed = [(self._random(), index) for index in range(len(values))]
        return [values[index] for _, index in sorted(keyed)]
