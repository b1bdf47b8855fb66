"""Reward the last number of an answer."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from trainer.types import Row

# A sign counts only where no word or number ends before it: in "3-5" and "x-5" it is a dash.
# Thousands are separated by commas in threes; "1,2" is two numbers.
NUMBER: Final = re.compile(
    r"(?:(?<![\w.)\]])[-+\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,6}(?!\w|\.[0-9]))?"
)


def last_number(
    completion: str, row: Row, *, field: str = "answer", tolerance: float = 0.0, after: str | None = None
) -> float:
    r"""1.0 if the last number in the completion equals `row["answer"]`, else 0.0.

    >>> last_number("Half of 2,500 is 1,250.", {"answer": "1250.0"})
    1.0
    >>> last_number("It costs $3.50, not 4", {"answer": 3.5})
    0.0
    >>> last_number("between 3-5", {"answer": 5}), last_number("it is \u22125", {"answer": "-5"})
    (1.0, 1.0)
    >>> last_number("I do not know.", {"answer": 5})
    0.0

    The answer is a number, or a string whose last number counts, so that GSM8K's "... #### 72" works as it is. Numbers
    are compared as decimals: 0.1 equals .10. Nothing is computed: "1/3" ends in 3, "5^5^5^5" in 5, "50%" is 50.
    LaTeX's 1{,}250 is 1,250.

    Args:
        completion: what the model wrote.
        row: holds the answer.
        field: the row's field with the answer.
        tolerance: largest difference that still counts as equal.
        after: look only behind the last occurrence of this text, for instance "####"; without it the reward is 0.0.
    """
    expected = find_last_number(str(row[field]))
    if expected is None:
        raise ValueError(f"{row}: {field} holds no number: {row[field]!r}")
    if after is not None:
        _, found, completion = completion.rpartition(after)
        if not found:
            return 0.0
    number = find_last_number(completion)
    if number is None:
        return 0.0
    if number == expected:
        return 1.0
    # Differences only of numbers of ordinary size: 1e999999 - 1 has a million digits.
    if not tolerance or abs(number.adjusted() - expected.adjusted()) > 20 or len(number.as_tuple().digits) > 1000:
        return 0.0
    return float(abs(number - expected) <= Decimal(repr(tolerance)))


def find_last_number(text: str) -> Decimal | None:
    """Return the last number of a text.

    >>> find_last_number("1,250.50 and -.5"), find_last_number("v1.2.3"), find_last_number("2e3.")
    (Decimal('-0.5'), Decimal('3'), Decimal('2E+3'))
    """
    last = None
    for last in NUMBER.finditer(text.replace("{,}", ",")):  # noqa: B007 - the last match is what is wanted
        pass
    return None if last is None else Decimal(last.group().replace(",", "").replace("\u2212", "-"))
