"""Retrying what fails for a moment."""

from __future__ import annotations

import pytest

from trainer.retry import backoff, regular, retry, wait_until


def failing(number: int, error: Exception):
    """An operation that fails so many times and then returns how often it was called."""
    calls = []

    def operation() -> int:
        calls.append(1)
        if len(calls) <= number:
            raise error
        return len(calls)

    return operation, calls


def is_os_error(error: Exception) -> bool:
    return isinstance(error, OSError)


def test_operation_is_called_until_it_succeeds():
    operation, _ = failing(2, OSError("busy"))
    assert retry(operation, is_transient=is_os_error, pauses_s=backoff(0.0, 3)) == 3


def test_error_of_the_last_call_propagates():
    operation, calls = failing(9, OSError("busy"))
    with pytest.raises(OSError, match="busy"):
        retry(operation, is_transient=is_os_error, pauses_s=backoff(0.0, 3))
    assert len(calls) == 4


def test_other_errors_propagate_at_once():
    operation, calls = failing(9, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retry(operation, is_transient=is_os_error, pauses_s=backoff(0.0, 3))
    assert len(calls) == 1


def test_no_pauses_mean_one_call():
    operation, calls = failing(1, OSError("busy"))
    with pytest.raises(OSError, match="busy"):
        retry(operation, is_transient=is_os_error, pauses_s=regular(0.01, timeout_s=0))
    assert len(calls) == 1


def test_condition_is_checked_at_least_once():
    assert wait_until(lambda: True, timeout_s=0, poll_s=1)
    assert not wait_until(lambda: False, timeout_s=0, poll_s=0)


def test_condition_that_comes_true_ends_the_wait():
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), timeout_s=60, poll_s=0)
