"""Rows from JSON files: one object a line, or one array. No torch."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from trainer.data.json_array import array_values
from trainer.errors import DataError

ZSTANDARD: Final = ".zst"
GZIP: Final = ".gz"
SIGNATURES: Final = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89HDF": "an HDF5 file",
}
"""First bytes of files that are not text."""


def read_json_rows(path: Path, refused: list[DataError] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number from 1, fields) of every row: its line, or its place in an array.

    Args:
        path: a file of one JSON object a line or of one JSON array, perhaps compressed (.gz, .zst).
        refused: takes the mistakes of single lines, which are then left out; without it the first one is raised.

    Raises:
        DataError: the file is not JSON, or a line is no JSON object.
    """
    try:
        with _opened(path) as file:
            start = _start_of(file)
            for signature, what in SIGNATURES.items():
                if start.startswith(signature):
                    raise DataError(f"{path}: is {what}, not JSON. Name the file accordingly, such as rows.parquet.")
            if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and not _is_rows_of_lists(start):
                yield from _array_rows(file, path)
            else:
                yield from _line_rows(file, path, refused)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be decompressed: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == GZIP:
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ZSTANDARD:
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _start_of(file: IO[bytes]) -> bytes:
    assert isinstance(file, io.BufferedReader), "opened for reading, buffered"
    return file.peek(4096)


def _is_rows_of_lists(start: bytes) -> bool:
    """Whether the first line alone is a whole JSON array: then the file has one value a line, not one array."""
    line, newline, rest = start.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if not newline or not rest.strip():
        return False
    try:
        return isinstance(json.loads(line), list)
    except ValueError:
        return False


def _array_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        for number, value in enumerate(array_values(file), start=1):
            if not isinstance(value, dict):
                raise DataError(f"{path}: element {number}: expected a JSON object, found {type(value).__name__}")
            yield number, value
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: the file begins as a JSON array and is not valid JSON: {error.msg} at column "
            f"{error.colno}. Fix the array, or write one JSON object a line."
        ) from None


def _line_rows(file: IO[bytes], path: Path, refused: list[DataError] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = parse_line(line, f"{path}:{number}")
        except DataError as error:
            if refused is None:
                raise
            refused.append(error)
        else:
            yield number, value


def parse_line(line: bytes, source: str) -> Mapping[str, Any]:
    """The fields of a line.

    Raises:
        DataError: it is no JSON object; the message begins with `source`.
    """
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(line.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = " (the line looks cut off)" if is_cut else ""
        message = f"{source}: not JSON: {error.msg} at column {error.colno}{cut}. Fix or remove the line."
        raise DataError(message) from None
    if not isinstance(value, dict):
        raise DataError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value
