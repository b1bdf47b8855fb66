"""The rows of a step, as a function of seed and step."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Final

from trainer.data.permutation import Permutation
from trainer.errors import NumericalError

MAX_SHUFFLED: Final = 100_000
"""Up to so many rows an epoch is a shuffled list, above a `Permutation`, whose cost does not depend on the rows."""


def rows_of_step(seed: int, step: int, rows_per_step: int, num_rows: int, excluded: Collection[int] = ()) -> list[int]:
    """Row indices of a step.

    Epochs are permutations laid end to end, so a step may reach into the next epoch. With 5 rows and 2 rows per step,
    step 2 takes the last row of epoch 0 and the first row of epoch 1, here the same one:

    >>> list(epoch_order(7, 0, 5)), list(epoch_order(7, 1, 5))
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
        rows += _part(f"rows:{seed}:{epoch}", num_rows, offset, rows_per_step - len(rows))
    if not excluded:
        return rows
    others = (row for row in _order(f"spare:{seed}:{step}", num_rows) if row not in excluded)
    spare = list(islice(others, rows_per_step))
    if not spare:
        raise NumericalError(f"all {num_rows:,} rows are excluded because their losses are not finite; none is left")
    return [spare[index % len(spare)] if row in excluded else row for index, row in enumerate(rows)]


def epoch_order(seed: int, epoch: int, num_rows: int) -> Iterator[int]:
    """The permutation of an epoch, computed as far as it is read.

    Args:
        seed: of the run.
        epoch: from 0; negative ones are never trained in order and serve as further permutations.
        num_rows: of the data.
    """
    return _order(f"rows:{seed}:{epoch}", num_rows)


def _part(name: str, num_rows: int, offset: int, most: int) -> Sequence[int]:
    """Up to `most` elements of a permutation from `offset` on."""
    if num_rows <= MAX_SHUFFLED:
        return _shuffled(name, num_rows)[offset : offset + most]
    order = Permutation(name, num_rows)
    return [order.at(position) for position in range(offset, min(offset + most, num_rows))]


def _order(name: str, num_rows: int) -> Iterator[int]:
    return iter(_shuffled(name, num_rows) if num_rows <= MAX_SHUFFLED else Permutation(name, num_rows))


@lru_cache(maxsize=2)
def _shuffled(name: str, num_rows: int) -> tuple[int, ...]:
    """A shuffled list; the last two are kept, since all steps of an epoch read the same one."""
    order = list(range(num_rows))
    random.Random(name).shuffle(order)
    return tuple(order)
