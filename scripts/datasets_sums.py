"""Rows of the RFT quickstart: sums of two small numbers, worded in many ways.

Held-out rows differ twice from training: in their wordings, and in their first numbers (20 to 29).
"""

from __future__ import annotations

from typing import Any, Final

from datasets_random import Draws

EXAMPLE: Final = (
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "What is 12 + 5?"},
    {"role": "assistant", "content": "12 + 5 = 17"},
)
"""Start of every prompt: without it the model gives long answers and would mostly learn to be brief."""
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
FIRST: Final = {"train": (*range(2, 20), *range(30, 40)), "heldout": tuple(range(20, 30))}
SECOND: Final = range(2, 10)


def make_sums_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return the rows of one split, no wording with the same numbers twice."""
    wordings = WORDINGS[split].strip().splitlines()
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
        for a in FIRST[split]
        for b in SECOND
    ]
    return draws.shuffled(rows)[: NUM_ROWS[split]]
