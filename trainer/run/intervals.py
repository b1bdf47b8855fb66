"""Bootstrap intervals of a mean, and of a paired difference. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95


@final
@dataclass(frozen=True)
class PairedDifference:
    """Two means over the same items, and the interval of their difference.

    Four prompts with mean rewards 0, 0, 1, 1 under one model and 0, 1, 1, 1 under the other: `first` 0.5, `second`
    0.75, `difference` 0.25 with a 95% interval of 0 to 0.75.
    """

    num_pairs: int
    first: float
    second: float
    difference: float
    """Of the second minus the first."""
    low: float
    high: float
    num_better: int
    """Pairs of which the second value is greater."""
    num_worse: int

    def __str__(self) -> str:
        """The difference and its interval, for people.

        >>> print(paired_difference([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], seed=0))
        +0.25 (95% interval +0 to +0.75) over 4 pairs
        """
        pairs = "1 pair" if self.num_pairs == 1 else f"{self.num_pairs:,} pairs"
        interval = f"{CONFIDENCE:.0%} interval {self.low:+.4g} to {self.high:+.4g}"
        return f"{self.difference:+.4g} ({interval}) over {pairs}"


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; a function of values and seed."""
    generator = random.Random(f"bootstrap:{seed}")
    means = sorted(math.fsum(generator.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    tail = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return means[tail], means[-1 - tail]


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int) -> PairedDifference:
    """Compare two values of each item; pairs are resampled, so what makes an item easy or hard cancels.

    Args:
        first: one value per item, at least one.
        second: the other value of each item, in the same order.
        seed: of the resampling.
    """
    differences = [after - before for before, after in zip(first, second, strict=True)]
    low, high = bootstrap_interval(differences, seed)
    return PairedDifference(
        num_pairs=len(differences),
        first=math.fsum(first) / len(first),
        second=math.fsum(second) / len(second),
        difference=math.fsum(differences) / len(differences),
        low=low,
        high=high,
        num_better=sum(difference > 0 for difference in differences),
        num_worse=sum(difference < 0 for difference in differences),
    )
