"""Read metrics.jsonl while it grows, at a cost that does not depend on its length.

The file is appended to, one JSON object a line. An attempt that starts replaces it by a copy that ends at its
checkpoint. So a reader may find a last line that is half-written, a file that is shorter than before, and, after a
power cut, lines that are damaged (blocks of NUL bytes); it skips what is no record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO, Final, final

Record = dict[str, Any]
"""One step, for example `{"step": 3, "time": 1753.2, "train/loss": 0.71}`."""
BLOCK_BYTES: Final = 2**14
"""First read from the end; doubled while no line end is found."""
ANCHOR_BYTES: Final = 256
"""So many bytes before the cursor are compared at each poll: other bytes there mean that the file was replaced."""


def read_records(file: Path) -> list[Record]:
    """Every record, in order; a half-written last line and damaged lines are left out."""
    try:
        with file.open("rb") as opened:
            found = (_parsed(line[:-1]) for line in opened if line.endswith(b"\n"))
            return [record for record in found if record is not None]
    except FileNotFoundError:
        return []


def newest_records(file: Path, number: int) -> list[Record]:
    """The last records, in order, read from the end of the file."""
    try:
        with file.open("rb") as opened:
            return list(islice(_backwards(opened, _size(opened)), number))[::-1]
    except FileNotFoundError:
        return []


@final
class MetricsReader:
    """A cursor in metrics.jsonl: each poll returns the records that were added since the one before."""

    def __init__(self, file: Path, last: int = 0) -> None:
        """Place the cursor.

        Args:
            file: metrics.jsonl; it may not exist yet.
            last: number of existing records that the first poll returns.
        """
        self._file = file
        self._cursor = 0
        """End of the lines that were read."""
        self._anchor = b""
        """The bytes before the cursor."""
        self._step = -1
        """Step of the newest record that was read."""
        self._seen: tuple[int, int, int] | None = None
        """Inode, size and modification time at the last poll."""
        self._waiting: list[Record] = []
        if file.exists():
            with file.open("rb") as opened:
                size = _size(opened)
                self._waiting = list(islice(_backwards(opened, size), last))[::-1]
                self._jump_to_end(opened, size)

    def poll(self) -> list[Record]:
        """The records that are new. After a return to a checkpoint: those that follow it, as they are written."""
        records, self._waiting = self._waiting, []
        try:
            with self._file.open("rb") as opened:
                return records + self._new(opened)
        except FileNotFoundError:
            return records

    def _new(self, opened: BinaryIO) -> list[Record]:
        stat = os.fstat(opened.fileno())
        seen, self._seen = self._seen, (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen == self._seen:
            return []
        opened.seek(self._cursor - len(self._anchor))
        if opened.read(len(self._anchor)) == self._anchor:
            return self._advance(opened.read())
        return self._resynchronize(opened, stat.st_size)

    def _advance(self, data: bytes) -> list[Record]:
        """Parse whole lines from the cursor on; what follows the last line end is read again at the next poll."""
        whole = data[: data.rfind(b"\n") + 1]
        records = [record for line in whole.split(b"\n") if (record := _parsed(line)) is not None]
        self._cursor += len(whole)
        self._anchor = (self._anchor + whole[-ANCHOR_BYTES:])[-ANCHOR_BYTES:]
        if records:
            self._step = records[-1]["step"]
        return records

    def _resynchronize(self, opened: BinaryIO, size: int) -> list[Record]:
        """Find the cursor in another file: behind the newest record of a step that was read before."""
        records = list(takewhile(lambda record: record["step"] > self._step, _backwards(opened, size)))
        self._jump_to_end(opened, size)
        return records[::-1]

    def _jump_to_end(self, opened: BinaryIO, size: int) -> None:
        """Place the cursor behind the last whole line."""
        self._cursor = next((end for end, _ in _lines_backwards(opened, size)), 0)
        opened.seek(max(0, self._cursor - ANCHOR_BYTES))
        self._anchor = opened.read(min(ANCHOR_BYTES, self._cursor))
        self._step = next((record["step"] for record in _backwards(opened, size)), -1)


def _parsed(line: bytes) -> Record | None:
    """The record of a line; None where the line is none."""
    try:
        record = json.loads(line.strip(b"\0 \t\r").decode())
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _size(opened: BinaryIO) -> int:
    return os.fstat(opened.fileno()).st_size


def _backwards(opened: BinaryIO, size: int) -> Iterator[Record]:
    """Records from the last to the first."""
    return (record for _, line in _lines_backwards(opened, size) if (record := _parsed(line)) is not None)


def _lines_backwards(opened: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines from the last to the first, each with the offset of its end.

    Args:
        opened: the file.
        size: where to begin: what is appended later is not read.
    """
    position, block = size, BLOCK_BYTES
    data = b""  # the file's bytes from `position` to a line end; empty while none was found
    while position > 0:
        number = min(block, position)
        position -= number
        opened.seek(position)
        data = opened.read(number) + data
        data = data[: data.rfind(b"\n") + 1]
        begin = data.find(b"\n") + 1 if position > 0 else 0
        if begin == len(data):  # no line end, or one line that begins further ahead
            block *= 2
            continue
        end = position + len(data)
        for line in reversed(data[begin:-1].split(b"\n")):
            yield end, line
            end -= len(line) + 1
        data, block = data[:begin], BLOCK_BYTES
