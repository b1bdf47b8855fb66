"""Rows of the RFT quickstart: sums of two small numbers, put in many ways.

A row is held out twice over: its wording and its pair of numbers are both absent from training.
"""

from __future__ import annotations

from typing import Any, Final

from datasets_random import Draws

EXAMPLE: Final = (
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "What is 12 + 5?"},
    {"role": "assistant", "content": "12 + 5 = 17"},
)
"""What every prompt begins with: without it the model rambles, and a short answer would be most of what it learns."""
NUM_ROWS: Final = {"train": 480, "heldout": 220}

WORDINGS: Final = {
    "train": """
What is {a} + {b}?
How much is {a} + {b}?
{a} + {b} = ?
Add {a} and {b}.
What is the sum of {a} and {b}?
What is {a} plus {b}?
Compute {a} + {b}.
Please add {b} to {a}.
Tell me {a} + {b}.
{a} and {b} make how much?
Give me the sum {a} + {b}.
The first number is {a}, the second is {b}. What is the total?
""",
    "heldout": """
{a} plus {b} is what?
Work out {a} + {b}.
Find the total of {a} and {b}.
Can you add {a} and {b} for me?
How much do {a} and {b} make together?
What do you get for {a} + {b}?
Calculate {a} plus {b}.
{a} + {b} equals what?
What is the result of {a} + {b}?
Sum: {a} + {b}
""",
}
# Pairs that training never shows, in either order.
HELDOUT_PAIRS: Final = frozenset(
    {(2, 3), (2, 5), (2, 8), (3, 4), (3, 6), (3, 9), (4, 4), (4, 7), (5, 6), (5, 9), (6, 8), (7, 7), (7, 9), (8, 9)}
)


def make_sums_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return the rows of one split, no wording with the same numbers twice."""
    wordings = WORDINGS[split].strip().splitlines()
    pairs = [
        (a, b)
        for a in range(2, 10)
        for b in range(2, 10)
        if ((min(a, b), max(a, b)) in HELDOUT_PAIRS) == (split == "heldout")
    ]
    rows = [
        {
            "messages": [
                *EXAMPLE,
                {"role": "user", "content": wording.format(a=a, b=b)},
            ],
            "answer": a + b,
            "family": f"sums-{split}-{number:02d}",
        }
        for number, wording in enumerate(wordings, 1)
        for a, b in pairs
    ]
    return draws.shuffled(rows)[: NUM_ROWS[split]]
