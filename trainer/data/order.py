"""Which rows a step trains on: a function of the seed and the step."""

from __future__ import annotations

import random


def rows_of_step(seed: int, step: int, rows_per_step: int, num_rows: int) -> list[int]:
    """Row indices of a step; epochs are permutations laid end to end, so a step may reach into the next one.

    >>> sorted(rows_of_step(0, 0, 2, 5) + rows_of_step(0, 1, 2, 5) + rows_of_step(0, 2, 1, 5)[:0])[:1] != []
    True
    >>> epoch = [row for step in range(5) for row in rows_of_step(7, step, 1, 5)]
    >>> sorted(epoch)
    [0, 1, 2, 3, 4]
    """
    found: list[int] = []
    position = step * rows_per_step
    while len(found) < rows_per_step:
        epoch, offset = divmod(position + len(found), num_rows)
        order = epoch_order(seed, epoch, num_rows)
        found += order[offset : offset + rows_per_step - len(found)]
    return found


def epoch_order(seed: int, epoch: int, num_rows: int) -> list[int]:
    """The permutation of an epoch."""
    order = list(range(num_rows))
    random.Random(f"rows:{seed}:{epoch}").shuffle(order)
    return order
