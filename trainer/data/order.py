"""Which rows a step trains on: a function of the seed and the step."""

from __future__ import annotations

import random
from collections.abc import Collection

from trainer.errors import NumericalError


def rows_of_step(seed: int, step: int, rows_per_step: int, num_rows: int, excluded: Collection[int] = ()) -> list[int]:
    """Row indices of a step; epochs are permutations laid end to end, so a step may reach into the next one.

    Args:
        seed: of the run.
        step: from 0.
        rows_per_step: how many.
        num_rows: of the data.
        excluded: rows that others stand in for; the other places of the run stay as they are.

    Raises:
        NumericalError: every row is excluded.

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
    if not excluded:
        return found
    spare = [row for row in _shuffled(f"spare:{seed}:{step}", num_rows) if row not in excluded]
    if not spare:
        raise NumericalError(f"all {num_rows:,} rows are excluded for losses that are not finite: nothing is left")
    return [spare[place % len(spare)] if row in excluded else row for place, row in enumerate(found)]


def epoch_order(seed: int, epoch: int, num_rows: int) -> list[int]:
    """The permutation of an epoch."""
    return _shuffled(f"rows:{seed}:{epoch}", num_rows)


def _shuffled(name: str, num_rows: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(name).shuffle(order)
    return order
