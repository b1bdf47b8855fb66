"""The rows of a step, as a function of seed and step."""

from __future__ import annotations

import random
from collections.abc import Collection

from trainer.errors import NumericalError


def rows_of_step(seed: int, step: int, rows_per_step: int, num_rows: int, excluded: Collection[int] = ()) -> list[int]:
    """Row indices of a step.

    Epochs are permutations laid end to end, so a step may reach into the next epoch. With 5 rows and 2 rows per step,
    step 2 takes the last row of epoch 0 and the first row of epoch 1, here the same one:

    >>> epoch_order(7, 0, 5), epoch_order(7, 1, 5)
    ([2, 3, 0, 1, 4], [4, 0, 2, 1, 3])
    >>> [rows_of_step(7, step, 2, 5) for step in range(4)]
    [[2, 3], [0, 1], [4, 4], [0, 2]]

    Args:
        seed: of the run.
        step: from 0.
        rows_per_step: how many rows.
        num_rows: of the data.
        excluded: rows that are replaced by others, chosen anew at each step; every other row keeps its step.

    Raises:
        NumericalError: every row is excluded.
    """
    rows: list[int] = []
    first = step * rows_per_step
    while len(rows) < rows_per_step:
        epoch, offset = divmod(first + len(rows), num_rows)
        order = epoch_order(seed, epoch, num_rows)
        rows += order[offset : offset + rows_per_step - len(rows)]
    if not excluded:
        return rows
    spare = [row for row in _shuffled(f"spare:{seed}:{step}", num_rows) if row not in excluded]
    if not spare:
        raise NumericalError(f"all {num_rows:,} rows are excluded because their losses are not finite; none is left")
    return [spare[index % len(spare)] if row in excluded else row for index, row in enumerate(rows)]


def epoch_order(seed: int, epoch: int, num_rows: int) -> list[int]:
    """The permutation of an epoch.

    Args:
        seed: of the run.
        epoch: from 0; negative ones are never trained in order and serve as further permutations.
        num_rows: of the data.
    """
    return _shuffled(f"rows:{seed}:{epoch}", num_rows)


def _shuffled(name: str, num_rows: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(name).shuffle(order)
    return order
