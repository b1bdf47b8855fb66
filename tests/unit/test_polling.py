"""Waiting for a condition, and pauses up to a timeout."""

from __future__ import annotations

from trainer.run.polling import pauses, wait_until


def test_condition_is_checked_at_least_once():
    assert wait_until(lambda: True, timeout_s=0, poll_s=1)
    assert not wait_until(lambda: False, timeout_s=0, poll_s=0)


def test_condition_that_comes_true_ends_the_wait():
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), timeout_s=60, poll_s=0)
    assert next(answers, None) is None, "and no further check is made"


def test_pauses_end_with_the_timeout():
    assert next(pauses(0.5, timeout_s=60)) == 0.5
    assert list(pauses(0.5, timeout_s=0)) == []
