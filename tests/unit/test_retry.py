"""A failed operation is called again while its error may be temporary."""

from __future__ import annotations

import pytest

from trainer.retry import retry


class Operation:
    """Fails a number of times before it returns "done"."""

    def __init__(self, failures: int, error: type[Exception] = ConnectionError) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"call {self.calls}")
        return "done"


def is_connection(error: Exception) -> bool:
    return isinstance(error, ConnectionError)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_it_succeeds_within_one_call_more_than_there_are_pauses(failures: int) -> None:
    operation = Operation(failures)
    assert retry(operation, pauses_s=(0.0, 0.0), is_transient=is_connection) == "done"
    assert operation.calls == failures + 1


def test_the_last_error_is_raised() -> None:
    operation = Operation(9)
    with pytest.raises(ConnectionError, match="call 3"):
        retry(operation, pauses_s=(0.0, 0.0), is_transient=is_connection)
    assert operation.calls == 3


def test_another_error_is_raised_at_once() -> None:
    operation = Operation(1, ValueError)
    with pytest.raises(ValueError, match="call 1"):
        retry(operation, pauses_s=(0.0, 0.0), is_transient=is_connection)
    assert operation.calls == 1
