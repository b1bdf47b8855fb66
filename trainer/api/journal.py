"""Files of records that survive a kill: requests as they came, and their results. No torch.

A record has a JSON head, a body, and a checksum over both. What a kill left half written at the end of a file is cut
off when the file is opened.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, final

from trainer.files import fsync_dir

MAGIC: Final = b"trn1"
FRAME: Final = struct.Struct("<4sIII")
"""Mark, checksum, bytes of the head, bytes of the body."""


@final
@dataclass(frozen=True)
class Record:
    """One record of a file."""

    head: Mapping[str, Any]
    offset: int
    """Where its body begins."""
    size: int
    """Bytes of its body."""


@final
class Journal:
    """One file, to which records are appended."""

    def __init__(self, path: Path) -> None:
        """Open the file, which is made where it is missing; cut off a torn end.

        Args:
            path: of the file.
        """
        self.path = path
        if not path.exists():
            path.touch()
            fsync_dir(path.parent)
        self._opened: BinaryIO | None = None
        self._lock = threading.RLock()
        self.records: list[Record] = []
        end = 0
        for record in _read(path):
            self.records.append(record)
            end = record.offset + record.size
        self._size = end
        if path.stat().st_size != end:
            os.truncate(path, end)

    def _file(self) -> BinaryIO:
        """The open file; under the lock."""
        if self._opened is None:
            self._opened = self.path.open("a+b")
        return self._opened

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._size

    def append(self, head: Mapping[str, Any], body: bytes = b"") -> Record:
        """Add a record; `sync` makes it survive a power cut, too.

        Args:
            head: what JSON can write.
            body: anything.
        """
        text = json.dumps(head, separators=(",", ":")).encode()
        frame = FRAME.pack(MAGIC, zlib.crc32(body, zlib.crc32(text)), len(text), len(body))
        with self._lock:
            file = self._file()
            file.write(frame + text + body)
            file.flush()
            record = Record(head, self._size + len(frame) + len(text), len(body))
            self._size = record.offset + record.size
            self.records.append(record)
        return record

    def sync(self) -> None:
        """Wait until what was appended is on disk."""
        with self._lock:
            handle = os.dup(self._file().fileno())  # `drop` may close the file meanwhile
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def body(self, record: Record) -> bytes:
        """The body of a record."""
        with self._lock:
            data = os.pread(self._file().fileno(), record.size, record.offset)
        assert len(data) == record.size
        return data

    def drop(self, keep: Callable[[Record], bool]) -> None:
        """Remove records; the file is replaced as a whole.

        Args:
            keep: says which stay.
        """
        with self._lock:
            kept = [(record.head, self.body(record)) for record in self.records if keep(record)]
            if len(kept) == len(self.records):
                return
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.unlink(missing_ok=True)
            new = Journal(temporary)
            for head, body in kept:
                new.append(head, body)
            new.sync()
            new.close()
            temporary.rename(self.path)
            fsync_dir(self.path.parent)
            self.close()
            self._size, self.records = new._size, new.records

    def close(self) -> None:
        """Close the file, which is opened again when it is used."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None


def _read(path: Path) -> Iterator[Record]:
    """The records of a file, up to the first that is not whole."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            frame = file.read(FRAME.size)
            if len(frame) < FRAME.size:
                return
            magic, checksum, head_size, body_size = FRAME.unpack(frame)
            if magic != MAGIC or file.tell() + head_size + body_size > size:
                return
            head = file.read(head_size)
            offset = file.tell()
            if zlib.crc32(file.read(body_size), zlib.crc32(head)) != checksum:
                return
            yield Record(json.loads(head), offset, body_size)
