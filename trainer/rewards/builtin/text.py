"""Reward text by comparison or by form."""

from __future__ import annotations

import re
import unicodedata

from trainer.rewards.builtin.answers import after_thinking
from trainer.types import Row, read_field


def exact_match(
    completion: str, row: Row, *, field: str = "answer", after: str | None = None, ignore_case: bool = False
) -> float:
    r"""1.0 if the completion is `row["answer"]`, or one of them if that is a list, else 0.0.

    >>> exact_match(" Paris\n", {"answer": "Paris"}), exact_match("Paris.", {"answer": "Paris"})
    (1.0, 0.0)
    >>> exact_match("Answer: no. Answer: YES", {"answer": ["yes", "yeah"]}, after="Answer:", ignore_case=True)
    1.0

    Space at the ends and runs of space within do not count, nor does the Unicode form in which an accent is written.
    Only what stands behind the thinking is compared; a completion that ends within its thinking has no answer.

    Args:
        completion: what the model wrote.
        row: holds the answer.
        field: the row's field with the answer or answers.
        after: compare only what follows the last occurrence of this text; without it the reward is 0.0.
        ignore_case: whether "YES" is "yes".
    """
    answers = read_answers(row, field)
    completion = after_thinking(completion)
    if after is not None:
        _, found, completion = completion.rpartition(after)
        if not found:
            return 0.0
    return float(_plain(completion, ignore_case) in {_plain(answer, ignore_case) for answer in answers})


def read_answers(row: Row, field: str) -> list[str]:
    """Return the texts that are right.

    Raises:
        ValueError: the field is null, empty, true or false, a list without texts, or an object; names the row.
    """
    found = read_field(row, field)
    answers = found if isinstance(found, list) else [found]
    if not answers or any(answer is None or isinstance(answer, dict | list) for answer in answers):
        raise ValueError(f"{row}: {field} must be a text, a number or a list of them, not {found!r:.80}")
    if any(isinstance(answer, bool) for answer in answers):
        raise ValueError(f'{row}: {field} is {found!r:.80}: write the text that the model is to write, as "yes"')
    if not all(str(answer).strip() for answer in answers):
        raise ValueError(f"{row}: {field} is empty: a model that says nothing would score 1.0")
    return [str(answer) for answer in answers]


def check_row(row: Row, *, field: str = "answer", **_: object) -> None:
    """Refuse a row without an answer to compare with.

    Raises:
        ValueError: names the row.
    """
    read_answers(row, field)


def _plain(text: str, ignore_case: bool) -> str:
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return plain.casefold() if ignore_case else plain


def regex_match(completion: str, row: Row, *, pattern: str, search: bool = False) -> float:
    r"""1.0 if the whole completion has the form `pattern`, else 0.0.

    >>> regex_match("<think>\nhm\n</think>\n42", {}, pattern=r"<think>.*</think>\s*\d+")
    1.0
    >>> regex_match("so 42", {}, pattern=r"\d+"), regex_match("so 42", {}, pattern=r"\d+", search=True)
    (0.0, 1.0)

    A dot also matches a line's end. A pattern that does not end on some text, as `(a+)+b`, is a failed reward.

    Args:
        completion: what the model wrote.
        row: not read.
        pattern: a regular expression of Python's `re`.
        search: whether it may match anywhere instead.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return float((compiled.search if search else compiled.fullmatch)(completion.strip()) is not None)
