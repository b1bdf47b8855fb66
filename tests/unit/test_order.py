"""Which rows a step trains on: epochs, and the rows that replace excluded ones."""

from __future__ import annotations

import pytest

from trainer.data.order import epoch_order, rows_of_step
from trainer.errors import NumericalError


def test_steps_walk_through_the_epochs():
    steps = [row for step in range(6) for row in rows_of_step(3, step, 4, 8)]
    assert steps == [row for epoch in range(3) for row in epoch_order(3, epoch, 8)]
    assert epoch_order(3, 0, 8) != epoch_order(3, 1, 8)


def test_a_step_may_be_longer_than_an_epoch():
    rows = rows_of_step(0, 0, 7, 3)
    assert rows == [*epoch_order(0, 0, 3), *epoch_order(0, 1, 3), epoch_order(0, 2, 3)[0]]


def test_only_excluded_rows_are_replaced_and_by_rows_that_are_not_excluded():
    excluded = {1, 4, 5}
    for step in range(20):
        plain, replaced = rows_of_step(0, step, 4, 10), rows_of_step(0, step, 4, 10, excluded)
        assert not excluded & set(replaced)
        for before, after in zip(plain, replaced, strict=True):
            assert before == after or before in excluded


def test_replacements_are_chosen_anew_at_each_step():
    # All rows but four are excluded, so that nearly every row of a step is a replacement.
    excluded = set(range(4, 40))
    orders = {step: tuple(rows_of_step(0, step, 4, 40, excluded)) for step in range(10)}
    replaced = [rows for step, rows in orders.items() if set(rows_of_step(0, step, 4, 40)) <= excluded]
    assert len(replaced) > 4
    assert len(set(replaced)) > 1  # one fixed order of the four would train them in the same places at every step
    assert all(orders[step] == tuple(rows_of_step(0, step, 4, 40, excluded)) for step in orders)
    assert orders != {step: tuple(rows_of_step(1, step, 4, 40, excluded)) for step in orders}


def test_no_row_left_is_refused():
    with pytest.raises(NumericalError, match="all 3 rows are excluded"):
        rows_of_step(0, 0, 2, 3, {0, 1, 2})
