"""What the user's rows are: their form, their length, and the settings that read them. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from trainer.config.length import CHARS_PER_TOKEN, TURN_TOKENS, count_rows
from trainer.config.recipe import DataSettings, DataSource
from trainer.config.source_files import source_files
from trainer.data.fields import use_of_fields
from trainer.data.forms import read_conversation, read_plain_text
from trainer.data.sources import is_in_part, read_rows
from trainer.errors import DataError
from trainer.types import Row

LOOKED_AT: Final = 2000
"""Rows that are read; of these the longest sets `max_seq_tokens`."""
PAIRS: Final = (
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("input", "output"),
    ("question", "response"),
    ("user", "assistant"),
    ("problem", "solution"),
    ("source", "target"),
)
"""Names of a prompt and an answer in rows of no common form."""
HELD_OUT_FRACS: Final = (0.1, 0.2)
HELD_OUT_AT_LEAST: Final = 2
HELD_OUT_FROM: Final = 20
"""With fewer rows none are held out: they would measure nothing."""
SHORTEST: Final = 256
MARGIN: Final = 1.5
"""Between the estimated tokens of the longest row and `max_seq_tokens`: the estimate counts characters."""


@final
@dataclass(frozen=True)
class DataFile:
    """Rows as they were recognised.

    Of 500 rows of ShareGPT: `DataFile("chats.jsonl", 500, "ShareGPT: conversations with from and value",
    longest_tokens=900, first=Row(...))`.
    """

    path: str
    num_rows: int | None
    """None where they cannot be counted here."""
    form: str
    longest_tokens: int
    """Of the rows that were read, estimated from their characters."""
    first: Row
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `data` that are needed to read them, such as `{"columns": {"prompt": "question"}}`."""
    held_out_frac: float | None = None
    """The `eval_frac` that holds some of the rows out; None where there are too few."""
    refused: Sequence[str] = ()
    """What the run would refuse in the first rows; for people."""

    @property
    def max_seq_tokens(self) -> int:
        """A power of two with room for the longest row."""
        return max(SHORTEST, 2 ** math.ceil(math.log2(max(2.0, self.longest_tokens * MARGIN))))


def look_at(path: str, *, is_rft: bool) -> DataFile:
    """Recognise the rows of a file, directory or glob.

    Args:
        path: as it would be written in a recipe.
        is_rft: whether rows are prompts only.

    Raises:
        DataError: there is no such file, or no setting reads its first row; names the fields that it has.
    """
    source = DataSource(path=path)
    if not source_files(source):
        raise DataError(f"{path}: no such file. Name a file of rows (.jsonl, .json, .csv, .parquet) or a directory.")
    refused: list[DataError] = []
    rows = read_rows(source, _settings({}), LOOKED_AT, refused)
    if not rows:
        raise refused[0]
    settings, form = _recognised(rows[0], is_rft=is_rft)
    problems = [str(error) for error in refused] + list(_problems(rows, settings, is_rft=is_rft))
    tokens = max(_tokens(row) for row in rows)
    return DataFile(path, count_rows(source), form, tokens, rows[0], settings, _held_out_frac(rows), problems)


def _held_out_frac(rows: Sequence[Row]) -> float | None:
    """A row's side depends on its content alone, so of few rows a small share may be none."""
    for share in HELD_OUT_FRACS if len(rows) >= HELD_OUT_FROM else ():
        held_out = DataSource(path="rows", eval_frac=share, part="eval")
        if sum(is_in_part(row.fields, held_out) for row in rows) >= HELD_OUT_AT_LEAST:
            return share
    return None


def _settings(extra: Mapping[str, Any]) -> DataSettings:
    return DataSettings.model_validate({"train": "rows", **extra})


def _candidates(row: Row, *, is_rft: bool) -> Iterator[dict[str, Any]]:
    """Settings that may read the row, the plainest first."""
    yield {}
    for prompt, answer in PAIRS:
        if prompt in row and (is_rft or answer in row):
            columns = {"prompt": prompt} if is_rft else {"prompt": prompt, "completion": answer}
            yield {"columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs}}
    if not is_rft and isinstance(row.get("text"), str):
        yield {"format": "text"}


def _recognised(row: Row, *, is_rft: bool) -> tuple[dict[str, Any], str]:
    first_error: DataError | None = None
    for extra in _candidates(row, is_rft=is_rft):
        try:
            return extra, _form(row, extra, is_rft=is_rft)
        except DataError as error:
            first_error = first_error or error
    assert first_error is not None, "the plain settings were tried"
    raise first_error


def _renamed(row: Row, settings: DataSettings) -> Row:
    return Row({**row, **{ours: row[theirs] for ours, theirs in settings.columns.items()}}, row.file, row.line)


def _form(row: Row, extra: Mapping[str, Any], *, is_rft: bool) -> str:
    """As what the row is read.

    Raises:
        DataError: it is not.
    """
    settings = _settings(extra)
    renamed = _renamed(row, settings)
    if settings.format == "text":
        return read_plain_text(renamed, settings).form
    read = read_conversation(renamed, settings, with_completion=not is_rft)
    mapped = ", ".join(f"{theirs} -> {ours}" for ours, theirs in settings.columns.items())
    return mapped or read.form


def _problems(rows: Sequence[Row], extra: Mapping[str, Any], *, is_rft: bool) -> Iterator[str]:
    """What the run would refuse: rows of another form, and fields whose text would be lost."""
    settings = _settings(extra)
    for row in rows:
        try:
            _form(row, extra, is_rft=is_rft)
            if not is_rft and settings.format == "chat":
                renamed = _renamed(row, settings)
                use_of_fields(renamed, read_conversation(renamed, settings, with_completion=True), settings)
        except DataError as error:
            yield str(error)
        except KeyError as error:
            yield f"{row}: no field {error}; the first row has it"


def _tokens(row: Row) -> int:
    """Tokens of all texts of a row, estimated from their characters."""
    texts = list(_texts(dict(row)))
    return math.ceil(sum(len(text) for text in texts) / CHARS_PER_TOKEN) + TURN_TOKENS * len(texts)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
