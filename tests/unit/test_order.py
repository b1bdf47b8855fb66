"""Which rows a step trains on: epochs, and the rows that replace excluded ones."""

from __future__ import annotations

import pytest

from trainer.data.order import MAX_SHUFFLED, epoch_order, rows_of_step
from trainer.data.permutation import Permutation
from trainer.errors import NumericalError


def test_steps_walk_through_the_epochs():
    steps = [row for step in range(6) for row in rows_of_step(3, step, 4, 8)]
    assert steps == [row for epoch in range(3) for row in epoch_order(3, epoch, 8)]
    assert list(epoch_order(3, 0, 8)) != list(epoch_order(3, 1, 8))


def test_a_step_may_be_longer_than_an_epoch():
    rows = rows_of_step(0, 0, 7, 3)
    assert rows == [*epoch_order(0, 0, 3), *epoch_order(0, 1, 3), next(epoch_order(0, 2, 3))]


def test_only_excluded_rows_are_replaced_and_by_rows_that_are_not_excluded():
    excluded = {1, 4, 5}
    for step in range(20):
        plain, replaced = rows_of_step(0, step, 4, 10), rows_of_step(0, step, 4, 10, excluded)
        assert not excluded & set(replaced)
        for before, after in zip(plain, replaced, strict=True):
            assert before == after or before in excluded


def test_replacements_are_chosen_anew_by_seed_and_step():
    excluded = set(range(4, 40))  # four rows are left

    def replacements(seed: int) -> dict[int, list[int]]:
        """Rows of the steps all of whose own rows are excluded."""
        steps = [step for step in range(40) if excluded.issuperset(rows_of_step(seed, step, 4, 40))]
        return {step: rows_of_step(seed, step, 4, 40, excluded) for step in steps}

    ours, others = replacements(0), replacements(1)
    assert all(sorted(rows) == [0, 1, 2, 3] for rows in (ours | others).values())
    assert len({tuple(rows) for rows in ours.values()}) > 4  # of 24 orders; one that ignored the step would give 1
    assert any(ours[step] != others[step] for step in ours.keys() & others.keys())
    assert replacements(0) == ours


def test_no_row_left_is_refused():
    with pytest.raises(NumericalError, match="all 3 rows are excluded"):
        rows_of_step(0, 0, 2, 3, {0, 1, 2})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 1025])
def test_a_permutation_has_every_row_once(size):
    assert sorted(Permutation("rows:0:0", size)) == list(range(size))


def test_a_permutation_depends_on_its_name():
    orders = {tuple(Permutation(f"rows:{seed}:{epoch}", 50)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_a_permutation_is_unbiased():
    # 4,000 orders of 4 rows: each row comes first in about 1,000; four standard deviations are 110.
    first = [Permutation(f"rows:0:{epoch}", 4).at(0) for epoch in range(4000)]
    assert all(abs(first.count(row) - 1000) < 110 for row in range(4))


def test_large_epochs_have_every_row_once():
    num_rows, rows_per_step = MAX_SHUFFLED + 7, 5000
    steps = range(-(-num_rows // rows_per_step))
    rows = [row for step in steps for row in rows_of_step(3, step, rows_per_step, num_rows)]
    assert sorted(rows[:num_rows]) == list(range(num_rows))
    assert rows[num_rows:] == rows_of_step(3, steps[-1], rows_per_step, num_rows)[num_rows - len(rows) :]
    assert rows[num_rows] == next(epoch_order(3, 1, num_rows))


def test_large_orders_are_a_function_of_seed_and_step():
    # Written out: another order after an update of this package would change what a resumed run trains on.
    assert rows_of_step(0, 0, 4, 1_000_000) == LARGE
    assert rows_of_step(0, 10**6, 4, 1_000_000) == rows_of_step(0, 10**6, 4, 1_000_000)
    assert rows_of_step(0, 0, 4, 1_000_000, {LARGE[1]})[::2] == LARGE[::2]
    assert rows_of_step(0, 0, 4, 1_000_000, {LARGE[1]})[1] != LARGE[1]


LARGE = [743457, 218253, 189339, 436985]
