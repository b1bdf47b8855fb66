"""Reward mathematics: expressions equal to the answer, by the library math-verify (extra `math`)."""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse, verify

from trainer.types import Row


def math_verify(completion: str, row: Row, *, field: str = "answer") -> float | None:
    r"""1.0 if the expression the completion ends in equals `row["answer"]`, else 0.0.

    >>> math_verify(r"So the answer is $\frac{2}{4}$.", {"answer": "1/2"})
    1.0
    >>> math_verify(r"\boxed{x^2 - 1}", {"answer": "$(x-1)(x+1)$"})
    1.0
    >>> math_verify("I cannot tell.", {"answer": "1/2"})
    0.0

    The library's own time limits are off, since signals do not reach C code: `5^5^5^5` is ended by the reward runner
    and counts as failed. An answer that the library cannot read is an error, not a 0.

    Args:
        completion: what the model wrote.
        row: holds the answer, with or without dollar signs.
        field: the row's field with the answer.
    """
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each call would warn that its limits are off
    gold = _parse(str(row[field]))
    if not gold:
        raise ValueError(f"{row}: {field} is no expression: {row[field]!r}")
    found = _parse(completion, may_be_bare=False)
    return float(bool(found) and verify(gold, found, timeout_seconds=None))


def _parse(text: str, *, may_be_bare: bool = True) -> list[Any]:
    found: list[Any] = parse(text, parsing_timeout=None)
    if may_be_bare and len(found) < 2 and "$" not in text and "\\boxed" not in text:
        found = parse(f"${text}$", parsing_timeout=None) or found
    return found
