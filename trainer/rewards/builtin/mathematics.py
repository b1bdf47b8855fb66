"""Reward mathematics: expressions equal to the answer, by the library math-verify (extra `math`)."""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse, verify

from trainer.rewards.builtin.answers import after_thinking
from trainer.types import Row, read_field

BOX = "\\boxed{"


def math_verify(completion: str, row: Row, *, field: str = "answer") -> float | None:
    r"""1.0 if the expression that the completion ends in equals `row["answer"]`, else 0.0.

    >>> math_verify(r"So the answer is $\frac{2}{4}$.", {"answer": "1/2"})
    1.0
    >>> math_verify(r"\boxed{x^2 - 1}", {"answer": "$(x-1)(x+1)$"})
    1.0
    >>> math_verify(r"\boxed{3}, no, \boxed{4}", {"answer": "4"}), math_verify("I cannot tell.", {"answer": "1/2"})
    (1.0, 0.0)

    Where the completion has boxes, the last one is the answer. Thinking, also thinking that is cut off, holds none. The
    library's own time limits are off, since signals do not reach C code: the reward runner ends `5^5^5^5` and counts it
    as failed. A row's answer that the library cannot read is an error, not a 0.

    Args:
        completion: what the model wrote.
        row: holds the answer, with or without dollar signs.
        field: the row's field with the answer.
    """
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each call would warn that its limits are off
    answer = read_field(row, field)
    gold = _parse(str(answer)) if answer is not None else []
    if not gold:
        raise ValueError(f"{row}: {field} is not an expression: {answer!r}")
    completion = after_thinking(completion)
    found = _parse(last_box(completion) or completion, may_be_bare=False)
    return float(bool(found) and verify(gold, found, timeout_seconds=None))


def last_box(text: str) -> str | None:
    r"""Return the last box of a text with its braces; None where there is none, or where it is not closed.

    >>> last_box(r"\boxed{1} or \boxed{\frac{1}{2}}."), last_box(r"\boxed{1} or \boxed{2")
    ('\\boxed{\\frac{1}{2}}', None)
    """
    start = text.rfind(BOX)
    depth = 0
    for position in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0 and text[position] == "}":
            return text[start : position + 1]
    return None


def _parse(text: str, *, may_be_bare: bool = True) -> list[Any]:
    found: list[Any] = parse(text, parsing_timeout=None)
    if may_be_bare and len(found) < 2 and "$" not in text and "\\boxed" not in text:
        found = parse(f"${text}$", parsing_timeout=None) or found
    return found
