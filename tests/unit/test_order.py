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
