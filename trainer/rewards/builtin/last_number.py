"""Reward the last number of an answer."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

from trainer.rewards.builtin.answers import after_thinking
from trainer.types import Row, read_field

# Thousands are separated by commas in threes; "1,2" is two numbers.
NUMBER: Final = re.compile(
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,6}(?!\w|\.[0-9]))?"
)
LATEX_THOUSANDS: Final = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
"""{,} and ,\\! and \\, and the thin spaces of typesetters."""
MINUS: Final = "-\u2212\u2013"
"""Hyphen, minus sign, en dash."""
CURRENCY: Final = "$\u20ac\u00a3\u00a5\\"
BEFORE_SIGN: Final = re.compile(
    r"(?:^|[=:(\[{,<>\u2248]|\b(?:is|are|was|be|equals|equal to|to|get|gets|gives|makes))$", re.I
)
"""What a sign may follow that stands apart from its number, as in "x = - 5"."""
GSM8K: Final = re.compile(r"####\s*(?P<number>\S+)\s*\Z")
WRAPPING: Final = re.compile(
    r"\A(?:\$|\\\(|\\\[)?\s*(?:\\boxed\{)?(?P<inner>.*?)\}?\s*(?:\$|\\\)|\\\])?\.?\Z", re.DOTALL
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

    The answer is a number, text that is one number ("$1,250", "-5", "50%"), or text that ends in GSM8K's "#### 72". Any
    other answer, such as "3/8", is refused: its last number alone would reward wrong completions. Numbers are compared
    as decimals: 0.1 equals .10. Nothing is computed: "1/3" ends in 3, "5^5^5^5" in 5, "50%" is 50. LaTeX's 1{,}250 and
    1,\!250 are 1,250. Thinking, also thinking that is cut off, holds no answer.

    Args:
        completion: what the model wrote.
        row: holds the answer.
        field: the row's field with the answer.
        tolerance: largest difference that still counts as equal.
        after: look only behind the last occurrence of this text, for instance "####"; without it the reward is 0.0.
    """
    expected = read_answer(row, field)
    completion = after_thinking(completion)
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


def check_row(row: Row, *, field: str = "answer", **_: Any) -> None:
    """Refuse a row whose answer is no number.

    Raises:
        ValueError: names the row and the answer.
    """
    read_answer(row, field)


def read_answer(row: Row, field: str) -> Decimal:
    """Return the number that the row's answer is.

    Raises:
        ValueError: it is not one number; names the row.
    """
    answer = read_field(row, field)
    text = "" if isinstance(answer, bool) or answer is None else str(answer).strip()
    marked = GSM8K.search(text)
    text = marked["number"] if marked is not None else text
    found = WRAPPING.match(text)
    assert found is not None, "every part of the pattern is optional"
    inner = LATEX_THOUSANDS.sub(",", found["inner"]).strip()
    sign, unsigned = _split_sign(inner.rstrip("%").removesuffix("\\").rstrip())
    if NUMBER.fullmatch(unsigned) is None:
        raise ValueError(
            f"{row}: {field} is not a number: {answer!r:.80}. last_number compares numbers only; let the answer end in "
            "`#### NUMBER`, or use math_verify for expressions and exact_match for text."
        )
    return Decimal(sign + unsigned.replace(",", ""))


def _split_sign(text: str) -> tuple[str, str]:
    """Take sign and currency off a number, in either order."""
    sign = ""
    while text and (text[0] in MINUS + "+" + CURRENCY or text[0].isspace()):
        if text[0] in MINUS + "+" and not sign:
            sign = "-" if text[0] in MINUS else "+"
        elif text[0] in MINUS + "+":
            break
        text = text[1:]
    return sign, text


def find_last_number(text: str) -> Decimal | None:
    r"""Return the last number of a text.

    >>> find_last_number("1,250.50 and -.5"), find_last_number("v1.2.3"), find_last_number("2e3.")
    (Decimal('-0.5'), Decimal('3'), Decimal('2E+3'))
    >>> find_last_number("It is -$5."), find_last_number("x = \u2013 5"), find_last_number("3 - 5")
    (Decimal('-5'), Decimal('-5'), Decimal('5'))
    """
    text = LATEX_THOUSANDS.sub(",", text)
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007  only the last match is needed
        pass
    if last is None:
        return None
    sign = "-" if _is_negative(text, last.start(), last.end()) else ""
    return Decimal(sign + last.group().replace(",", ""))


def _is_negative(text: str, start: int, end: int) -> bool:
    """Whether a minus before a number is its sign, and not a dash, a subtraction or the bullet of a list.

    Args:
        text: the whole text.
        start: where the unsigned number begins.
        end: where it ends.
    """
    before = text[max(0, start - 40) : start]
    bare = before.rstrip(CURRENCY)
    apart = bare.rstrip(" \t")
    if not apart or apart[-1] not in MINUS:
        return False
    is_apart = apart != bare
    rest = apart[:-1]
    if not is_apart:  # "-5" is negative, but not in "3-5", "x-5" or ")-5"
        return not (rest and (rest[-1].isalnum() or rest[-1] in "_.)]"))
    rest = rest.rstrip(" \t" + CURRENCY)
    if not rest or rest[-1] == "\n":  # a lone "- 5", or the bullet of a list
        is_alone = not text[:start].strip(" \t\r\n" + MINUS + CURRENCY) and "\n" not in text[end:].strip()
        return is_alone or apart[-1] != "-"
    return BEFORE_SIGN.search(rest) is not None
