"""How far counts are from a distribution."""

from __future__ import annotations

import math

import torch


def excess(counts: torch.Tensor, weights: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean; chance gives about 0.

    Args:
        counts: [K] how often each was seen.
        weights: [K] how often it should be, in any unit.
    """
    expected = weights.double() / weights.double().sum() * counts.sum()
    likely = expected >= 5  # the statistic needs about five in each cell: the others are one cell
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
    used = expected > 0
    statistic = ((seen - expected)[used].square() / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
