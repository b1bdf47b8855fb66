"""Rows of small Python functions: a task, its tests as assertions and a solution that passes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, final

from datasets_random import Draws

SYSTEM: Final = "Answer with one Python code block."


@final
class Family(NamedTuple):
    """Functions that differ in one value."""

    signature: str
    """With `{k}` in place of the value, as in the other texts; `{k!r}` is its literal."""
    task: str
    expression: str
    """What the function returns."""
    calls: Sequence[str]
    """Test arguments; expected results are computed from the expression."""
    values: Sequence[Any]


INTEGERS: Final = ("0", "3", "-7", "25")
WORDS: Final = ("'banana'", "'apple'", "'kiwi'", "'x'")
LISTS: Final = ("[4, 9, 2, 7, 1]", "[10, -3, 5, 0, 8, 6]", "[1, 2, 3, 4, 5]")

FAMILIES: Final = {
    "train": (
        Family("add_{k}(x)", "returns x plus {k}", "x + {k}", INTEGERS, (2, 3, 5, 7, 10, 100)),
        Family("times_{k}(x)", "returns x times {k}", "x * {k}", INTEGERS, (2, 3, 4, 6, 9, 12)),
        Family("power_{k}(x)", "returns x to the power of {k}", "x ** {k}", INTEGERS, (2, 3, 4, 5)),
        Family("item_{k}(values)", "returns the item of a list at index {k}", "values[{k}]", LISTS, (0, 1, 2, 3)),
        Family("first_{k}(values)", "returns the first {k} items of a list", "values[:{k}]", LISTS, (2, 3, 4, 5)),
        Family(
            "{k}_of(values)",
            "returns {k}(values) for a list",
            "{k}(values)",
            LISTS,
            ("sum", "max", "min", "len", "sorted"),
        ),
        Family("above_{k}(x)", "returns whether x is greater than {k}", "x > {k}", INTEGERS, (1, 4, 10, 20)),
        Family("to_{k}(text)", "returns text.{k}()", "text.{k}()", WORDS, ("upper", "title", "capitalize", "swapcase")),
        Family("count_{k}(text)", "returns how often the letter {k} is in text", "text.count({k!r})", WORDS, "abenp"),
        Family("starts_{k}(text)", "returns whether text starts with {k}", "text.startswith({k!r})", WORDS, "abkx"),
        Family("repeat_{k}(text)", "returns text written {k} times in a row", "text * {k}", WORDS, (2, 3, 4, 5)),
        Family(
            "{k}_name(name)",
            "returns '{k} ' followed by name",
            "{k!r} + ' ' + name",
            ("'Ann'", "'Bob'"),
            ("Hello", "Bye", "Hi", "Dear"),
        ),
        Family(
            "sum_plus_{k}(a, b)",
            "returns a plus b plus {k}",
            "a + b + {k}",
            ("1, 2", "-4, 9", "0, 0"),
            (1, 2, 3, 4, 5, 6),
        ),
    ),
    "heldout": (
        Family("minus_{k}(x)", "returns x minus {k}", "x - {k}", INTEGERS, (2, 4, 6, 8, 11, 50)),
        Family("divisible_{k}(x)", "returns whether x is divisible by {k}", "x % {k} == 0", INTEGERS, (2, 3, 5, 7, 25)),
        Family("last_{k}(values)", "returns the last {k} items of a list", "values[-{k}:]", LISTS, (2, 3, 4, 5)),
        Family("ends_{k}(text)", "returns whether text ends with {k}", "text.endswith({k!r})", WORDS, "aeix"),
        Family("without_{k}(text)", "returns text without the letter {k}", "text.replace({k!r}, '')", WORDS, "aenpk"),
        Family("drop_{k}(text)", "returns text without its first {k} letters", "text[{k}:]", WORDS, (1, 2, 3)),
        Family(
            "bigger_by_{k}(a, b)",
            "returns the larger of a and b, plus {k}",
            "max(a, b) + {k}",
            ("1, 2", "9, -4"),
            (0, 1, 10),
        ),
    ),
}


def make_code_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return the rows of one split."""
    rows = []
    for number, family in enumerate(FAMILIES[split], 1):
        for value in family.values:
            signature, task, expression = (text.format(k=value) for text in family[:3])
            name, _, names = signature.rstrip(")").partition("(")
            tests = [f"assert {name}({call}) == {result(names, expression, call)!r}" for call in family.calls]
            rows.append(
                {
                    "messages": [
                        {"role": "system", "content": SYSTEM},
                        {"role": "user", "content": f"Write a Python function {signature} that {task}."},
                    ],
                    "tests": tests,
                    "solution": f"def {signature}:\n    return {expression}",
                    "family": f"code-{split}-{number:02d}",
                }
            )
    return draws.shuffled(rows)


def result(names: str, expression: str, call: str) -> Any:
    """Return the value of the expression for these arguments; all three texts come from this file."""
    return eval(f"(lambda {names}: {expression})({call})")
