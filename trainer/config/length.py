"""Length of a run: rows, steps and epochs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from trainer.config.recipe import DataSource, Recipe

SAMPLED_ROWS: Final = 200
CHARS_PER_TOKEN: Final = 3.5
TURN_TOKENS: Final = 5
"""Tokens that a chat template adds to each turn. Rough, as CHARS_PER_TOKEN: for estimates before tokenizing."""


def count_rows(source: DataSource) -> int | None:
    """Return the number of non-blank lines of the file; None for rows from a hub."""
    if source.path is None or not Path(source.path).is_file():
        return None
    with Path(source.path).open("rb") as file:
        return sum(1 for line in file if line.strip())


def num_steps(recipe: Recipe, num_rows: int | None) -> int | None:
    """Return the number of steps; None if `epochs` is given and the rows cannot be counted without loading them."""
    if recipe.steps is not None:
        return recipe.steps
    if num_rows is None or recipe.epochs is None:
        return None
    return max(1, math.ceil(recipe.epochs * num_rows / recipe.rows_per_step))


def mean_row_tokens(recipe: Recipe) -> float | None:
    """Estimate the mean tokens of a training row from the characters of the first rows; None if they cannot be read."""
    source = recipe.data.train
    if source.path is None or not Path(source.path).is_file():
        return None
    with Path(source.path).open("rb") as file:
        lines = [line for line in itertools.islice(file, SAMPLED_ROWS) if line.strip()]
    try:
        turns = [_turns(json.loads(line), recipe) for line in lines]
    except (ValueError, AttributeError, TypeError):  # `check --data` and training report invalid rows
        return None
    system = [recipe.data.system] if recipe.data.system is not None else []
    tokens = [sum(len(text) / CHARS_PER_TOKEN + TURN_TOKENS for text in system + row) for row in turns]
    return min(sum(tokens) / len(tokens), recipe.data.max_seq_tokens) if tokens else None


def _turns(row: Mapping[str, object], recipe: Recipe) -> list[str]:
    """Return the text of each turn of a row."""
    columns = recipe.data.columns
    messages = row.get(columns.get("messages", "messages"))
    if messages is None:
        names = ("prompt", "completion") if recipe.method == "sft" else ("prompt",)
        messages = [row.get(columns.get(name, name), "") for name in names]
    if not isinstance(messages, list):
        raise TypeError(f"expected a list of messages, found {type(messages).__name__}")
    return [_text(message) for message in messages]


def _text(message: object) -> str:
    content = message.get("content") or message.get("tool_calls") if isinstance(message, dict) else message
    return content if isinstance(content, str) else json.dumps(content)
