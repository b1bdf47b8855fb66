"""Every row of a source: files of any kind that is read, directories, globs, lists and hub names. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import DataSettings, DataSource
from trainer.config.source_files import ARROW_ENDINGS, ending_of, source_files
from trainer.data.jsonl import read_json_rows
from trainer.errors import DataError
from trainer.types import MissingFieldError, Row, read_field

MESSAGE_COLUMNS: Final = ("role", "content")
"""Names in `data.columns` that are fields of a message, not of a row."""

Rows = Iterator[tuple[str, int, Mapping[str, Any]]]
"""Name of the file, number of the row, fields."""


def read_rows(
    source: DataSource, settings: DataSettings, limit: int | None = None, refused: list[DataError] | None = None
) -> list[Row]:
    """Read every row, or the first `limit`.

    Args:
        source: files, a hub data set, or several sources.
        settings: how its columns are called.
        limit: how many rows at most.
        refused: takes the mistakes of single lines, which are then left out; without it the first one is raised.

    Raises:
        DataError: there are no rows, or a line is not a JSON object; names file and line.
    """
    rows = list(stream_rows(source, settings, limit, refused))
    if not rows and not refused:
        raise DataError(f"{source.path or source.hub}: holds no rows. Give a file with one JSON object a line.")
    return rows


def stream_rows(
    source: DataSource, settings: DataSettings, limit: int | None = None, refused: list[DataError] | None = None
) -> Iterator[Row]:
    """Yield every row, or the first `limit`, without keeping them.

    Args:
        source: files, a hub data set, or several sources.
        settings: how its columns are called.
        limit: how many rows at most.
        refused: takes the mistakes of single lines, which are then left out; without it the first one is raised.

    Raises:
        DataError: a file cannot be read, or a line is not a JSON object; names file and line.
    """
    number = 0
    for name, line, raw in _rows_of(source, refused):
        if not is_in_part(raw, source):
            continue
        try:
            renamed = _rename(raw, settings.columns, f"{name}:{line}")
        except DataError as error:
            if refused is None:
                raise
            refused.append(error)
            continue
        yield Row(renamed, file=name, line=line, index=number)
        number += 1
        if number == limit:
            return


def is_in_part(fields: Mapping[str, Any], source: DataSource) -> bool:
    """Whether a row belongs to the part of the source that `data.eval_frac` gave it; decided by its content alone."""
    if source.eval_frac is None:
        return True
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)
    place = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64
    return (place < source.eval_frac) == (source.part == "eval")


def _rows_of(source: DataSource, refused: list[DataError] | None) -> Rows:
    if source.sources:
        for each in source.sources:
            part = {"eval_frac": source.eval_frac, "part": source.part}
            yield from _repeated(_rows_of(each.model_copy(update=part), refused), each.repeat)
        return
    files = source_files(source)
    if not files:
        from trainer.data.arrow import read_hub

        for number, fields in read_hub(source):
            yield f"{source.hub}[{source.split}]", number, fields
    for file in files:
        for number, fields in _rows_of_file(file, source, refused):
            yield str(file), number, fields


def _rows_of_file(
    file: Path, source: DataSource, refused: list[DataError] | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if file.is_dir():
        from trainer.data.arrow import read_saved

        return read_saved(file, source.split)
    if ending_of(file) in ARROW_ENDINGS:
        from trainer.data.arrow import read_table

        return read_table(file)
    return read_json_rows(file, refused)


def _repeated(rows: Rows, repeat: float) -> Rows:
    """Each row `repeat` times; a fraction keeps rows at even distances: of 0.5 every second one."""
    for index, row in enumerate(rows):
        for _ in range(int((index + 1) * repeat) - int(index * repeat)):
            yield row


def _rename(raw: Mapping[str, Any], columns: Mapping[str, str], source: str) -> Mapping[str, Any]:
    columns = {ours: theirs for ours, theirs in columns.items() if ours not in MESSAGE_COLUMNS}
    if not columns:
        return raw
    try:
        return {**raw, **{ours: read_field(raw, theirs) for ours, theirs in columns.items()}}
    except MissingFieldError as error:
        raise DataError(f"{source}: {error} (data.columns)") from None
    except KeyError as error:
        raise DataError(f"{source}: no field `{error.args[0]}` (data.columns); the row has: {', '.join(raw)}") from None
