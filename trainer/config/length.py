"""Length of a run: rows, steps and epochs."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from trainer.config.recipe import DataSource, Recipe
from trainer.config.source_files import ARROW_ENDINGS, ending_of, source_files
from trainer.config.stored_counts import count_arrow_file, count_hub, count_saved
from trainer.types import read_field

SAMPLED_ROWS: Final = 200
CHARS_PER_TOKEN: Final = 3.5
TURN_TOKENS: Final = 5
"""Tokens that a chat template adds to each turn. Rough, as CHARS_PER_TOKEN: for estimates before tokenizing."""


def count_rows(source: DataSource) -> int | None:
    """Return the number of rows of the files; None for rows from a hub, see `rows_for_epochs`."""
    if source.sources:
        counts = [(count_rows(each), each.repeat) for each in source.sources]
        known = [int(count * repeat) for count, repeat in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None
    files = source_files(source)
    counted = [_count_file(file, source.split) for file in files]
    if not files or None in counted:
        return None
    total = sum(count for count in counted if count is not None)
    if source.eval_frac is None:
        return total
    share = source.eval_frac if source.part == "eval" else 1 - source.eval_frac
    return max(1, round(total * share))


def rows_for_epochs(recipe: Recipe) -> int | None:
    """Return the number of training rows, of a hub data set only where the length of the run needs it."""
    source = recipe.data.train
    num_rows = count_rows(source)
    if num_rows is not None or recipe.epochs is None or source.hub is None:
        return num_rows
    return count_hub(source)


def _count_file(file: Path, split: str) -> int | None:
    ending = ending_of(file)
    try:
        if file.is_dir():
            return count_saved(file, split)
        if ending == ".arrow" and file.suffix == ending:
            return count_arrow_file(file)
        if ending == ".parquet":
            from pyarrow.parquet import ParquetFile  # here, so that only Parquet pays for the import

            return int(ParquetFile(file).metadata.num_rows)
        if ending in ARROW_ENDINGS and ending not in {".csv", ".tsv"}:
            return None
        with _opened(file) as lines:
            if ending in {".csv", ".tsv"}:
                table = io.TextIOWrapper(lines, encoding="utf-8", newline="")
                return max(0, sum(1 for row in csv.reader(table) if row) - 1)
            if ending == ".json":
                content = lines.read()
                if content.lstrip()[:1] == b"[":
                    return len(json.loads(content))
                return sum(1 for line in content.splitlines() if line.strip())
            return sum(1 for line in lines if line.strip())
    except (ValueError, OSError, EOFError, KeyError):  # reading the rows says what is wrong with the file
        return None


def _opened(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file, "rb"))
    if file.suffix == ".zst":
        import pyarrow  # here, so that only Zstandard pays for the import

        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"))
    return file.open("rb")


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

    def read(name: str) -> object:
        try:
            return read_field(row, columns.get(name, name))
        except KeyError:
            return None

    messages = read("messages")
    if messages is None:
        names = ("prompt", "completion") if recipe.method == "sft" else ("prompt",)
        messages = [read(name) or "" for name in names]
    if not isinstance(messages, list):
        raise TypeError(f"expected a list of messages, found {type(messages).__name__}")
    return [_text(message) for message in messages]


def _text(message: object) -> str:
    content = message.get("content") or message.get("tool_calls") if isinstance(message, dict) else message
    return content if isinstance(content, str) else json.dumps(content)
