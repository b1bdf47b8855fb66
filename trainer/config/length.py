"""How long a run is: rows, steps, epochs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import DataSource, Recipe

SAMPLED_ROWS: Final = 200
CHARS_PER_TOKEN: Final = 3.5
TURN_TOKENS: Final = 5
"""What a chat template puts around a turn. Both rough, for estimates before anything is tokenized."""


def count_rows(source: DataSource) -> int | None:
    """Lines of a file that are not blank; None where the rows come from a hub."""
    if source.path is None or not Path(source.path).is_file():
        return None
    with Path(source.path).open("rb") as file:
        return sum(1 for line in file if line.strip())


def num_steps(recipe: Recipe, num_rows: int | None) -> int | None:
    """Steps of the run; None where they follow from epochs of rows that cannot be counted here."""
    if recipe.steps is not None:
        return recipe.steps
    if num_rows is None or recipe.epochs is None:
        return None
    return max(1, math.ceil(recipe.epochs * num_rows / recipe.rows_per_step))


def mean_row_tokens(recipe: Recipe) -> float | None:
    """Tokens of a training row, from the characters of the first rows; None where they are on a hub or unreadable."""
    source = recipe.data.train
    if source.path is None or not Path(source.path).is_file():
        return None
    with Path(source.path).open("rb") as file:
        lines = [line for line in itertools.islice(file, SAMPLED_ROWS) if line.strip()]
    try:
        turns = [_turns(json.loads(line), recipe) for line in lines]
    except (ValueError, AttributeError, TypeError):  # `check --data` and training say what is wrong with a row
        return None
    system = [recipe.data.system] if recipe.data.system is not None else []
    tokens = [sum(len(text) / CHARS_PER_TOKEN + TURN_TOKENS for text in system + row) for row in turns]
    return min(sum(tokens) / len(tokens), recipe.data.max_seq_tokens) if tokens else None


def _turns(row: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The texts of a row, one for each turn."""
    columns = recipe.data.columns
    messages = row.get(columns.get("messages", "messages"))
    if messages is None:
        names = ("prompt", "completion") if recipe.method == "sft" else ("prompt",)
        messages = [row.get(columns.get(name, name), "") for name in names]
    return [_text(message) for message in messages]


def _text(message: Any) -> str:
    content = message.get("content") or message.get("tool_calls") if isinstance(message, dict) else message
    return content if isinstance(content, str) else json.dumps(content)
