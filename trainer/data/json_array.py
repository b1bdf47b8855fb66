"""Values of a JSON array one after the other, so that a large file is not held in memory. No torch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any, Final, final

CHUNK_BYTES: Final = 1 << 20
"""Read at a time; doubled while one value is longer."""
BLANKS: Final = " \t\r\n"
LITERAL: Final = 12
"""An error this close to the end of what was read may be a literal, a number or an escape that is cut there."""


def array_values(file: IO[bytes], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Any]:
    """Yield the values of the array that a UTF-8 file consists of.

    Args:
        file: opened at its start.
        chunk_bytes: read at a time.

    Raises:
        JSONDecodeError: it is no JSON array; `lineno` and `colno` are those in the file.
        UnicodeDecodeError: it is no UTF-8; `start` is the place in the file.
    """
    text = _Text(file, chunk_bytes)
    text.expect("[")
    if not text.takes("]"):
        yield text.value()
        while not text.takes("]"):
            text.expect(",")
            yield text.value()
    text.expect_end()


@final
class _Text:
    """The part of a file that was read and not consumed yet."""

    def __init__(self, file: IO[bytes], chunk_bytes: int) -> None:
        self._file, self._chunk_bytes = file, chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._num_bytes = 0
        self._text, self._at, self._has_ended = "", 0, False
        self._lines, self._columns = 0, 0  # before `_text`

    def expect(self, character: str) -> None:
        """Consume a character behind blanks."""
        if not self.takes(character):
            what = f"Expecting '{character}'" + (" delimiter" if character == "," else "")
            raise self._located(json.JSONDecodeError(what, self._text, self._at))

    def takes(self, character: str) -> bool:
        """Consume a character behind blanks if it is the next one."""
        self._skip_blanks()
        is_next = self._text.startswith(character, self._at)
        self._at += is_next
        return is_next

    def expect_end(self) -> None:
        """Only blanks may follow."""
        self._skip_blanks()
        if self._at < len(self._text):
            raise self._located(json.JSONDecodeError("Extra data", self._text, self._at))

    def value(self) -> Any:
        """Consume a value."""
        self._skip_blanks()
        size = self._chunk_bytes
        while True:
            try:
                value, self._at = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LITERAL
                if self._has_ended or not is_cut:
                    raise self._located(error) from None
                self._read(size)
                size *= 2
            else:
                return value

    def _skip_blanks(self) -> None:
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANKS:
                self._at += 1
            if self._at < len(self._text) or self._has_ended:
                return
            self._read(self._chunk_bytes)

    def _read(self, size: int) -> None:
        """Drop what was consumed and read on."""
        consumed = self._text[: self._at]
        newlines = consumed.count("\n")
        self._lines += newlines
        self._columns = len(consumed) - consumed.rfind("\n") - 1 + (0 if newlines else self._columns)
        chunk = self._file.read(size)
        self._has_ended = not chunk
        pending = len(self._decoder.getstate()[0])
        try:
            decoded = self._decoder.decode(chunk, self._has_ended)
        except UnicodeDecodeError as error:
            place = self._num_bytes - pending + error.start
            raise UnicodeDecodeError(error.encoding, b"", place, place + 1, error.reason) from None
        self._num_bytes += len(chunk)
        self._text, self._at = self._text[self._at :] + decoded, 0

    def _located(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """The error with line and column of the file."""
        if error.lineno == 1:
            error.colno += self._columns
        error.lineno += self._lines
        return error
