"""Rows of the two tasks with several turns: a calculator tool, and a guessing game."""

from __future__ import annotations

from typing import Any, Final

from datasets_random import Draws

TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two whole numbers.",
        "parameters": {
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "type": "object",
        },
    },
}
"""The schema of recipes/environments/calculator.py:multiply; a test compares them."""
NUM_ROWS: Final = {"train": 320, "heldout": 100}
PRODUCTS: Final = {
    "train": ("What is {a} times {b}?", "Multiply {a} by {b}.", "How much is {a} * {b}?", "Compute {a} x {b}."),
    "heldout": ("Find the product of {a} and {b}.", "{a} times {b} is what?", "Work out {a} * {b}."),
}
FACTORS: Final = {"train": (*range(12, 50), *range(60, 99)), "heldout": tuple(range(50, 60))}
CALL_EVERY: Final = 4
"""Of the demonstrations of each wording, every fourth calls the tool; the others answer from memory."""
CONSISTENT_EVERY: Final = 3
"""Of the games of each wording, in every third all guesses agree with the hints."""
QUESTIONS: Final = {
    "train": (
        "I think of a number from {low} to {high}. Guess it. You have {n} guesses.",
        "Guess my number. It is between {low} and {high}, and you have {n} guesses.",
        "My number is at least {low} and at most {high}. What is it? {n} guesses.",
    ),
    "heldout": (
        "Find the number that I chose from {low} to {high}, with {n} guesses.",
        "There is a secret number from {low} to {high}. You may guess {n} times.",
    ),
}
LOWEST: Final = {"train": (1, 2, 4, 5, 7, 8, 10, 11), "heldout": (3, 6, 9)}
SPAN: Final = 8
GUESSES: Final = 3
RULE: Final = {"role": "system", "content": "Answer with one number."}


def make_calculator_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return products to compute, with the answer."""
    rows = []
    for number in range(NUM_ROWS[split]):
        a, b = draws.pick(FACTORS[split]), draws.pick(FACTORS[split])
        text = PRODUCTS[split][number % len(PRODUCTS[split])].format(a=a, b=b)
        family = f"product-{split}-{number % len(PRODUCTS[split])}"
        rows.append(
            {"messages": [{"role": "user", "content": text}], "answer": a * b, "family": family, "a": a, "b": b}
        )
    return rows


def make_calculator_demos(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return answers to products, a quarter of them by the tool."""
    demos = []
    for number, row in enumerate(make_calculator_rows(split, draws)):
        messages = [*row["messages"]]
        if number // len(PRODUCTS[split]) % CALL_EVERY == 0:  # in each wording, so that none alone means "call"
            call = {"name": "multiply", "arguments": {"a": row["a"], "b": row["b"]}}
            messages += [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "id": "call_0", "function": call}],
                },
                {"role": "tool", "tool_call_id": "call_0", "name": "multiply", "content": str(row["answer"])},
            ]
        messages.append({"role": "assistant", "content": str(row["answer"])})
        demos.append({"messages": messages, "tools": [TOOL], "family": row["family"]})
    return demos


def make_guess_rows(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return games, each with its secret."""
    rows = []
    for number in range(NUM_ROWS[split]):
        low = draws.pick(LOWEST[split])
        high = low + SPAN - 1
        form = number % len(QUESTIONS[split])
        question = QUESTIONS[split][form].format(low=low, high=high, n=GUESSES)
        row = {"question": question, "low": low, "high": high, "guesses": GUESSES, "answer": draws.between(low, high)}
        rows.append(row | {"family": f"guess-{split}-{form}"})
    return rows


def make_guess_demos(split: str, draws: Draws) -> list[dict[str, Any]]:
    """Return played games: in a third of them every guess agrees with the hints, in the others guesses are random."""
    demos = []
    for number, row in enumerate(make_guess_rows(split, draws)):
        low, high = row["low"], row["high"]
        messages: list[dict[str, Any]] = [RULE, {"role": "user", "content": row["question"]}]
        for _ in range(row["guesses"]):
            guess = draws.between(low, high)
            messages.append({"role": "assistant", "content": str(guess)})
            if guess == row["answer"]:
                break
            is_higher = row["answer"] > guess
            if number // len(QUESTIONS[split]) % CONSISTENT_EVERY == 0:
                low, high = (guess + 1, high) if is_higher else (low, guess - 1)
            messages.append({"role": "user", "content": "Higher." if is_higher else "Lower."})
        if messages[-1]["role"] == "user":
            messages.pop()
        demos.append({"messages": messages, "family": row["family"]})
    return demos
