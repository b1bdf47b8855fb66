"""Answers of judges by their content, in memory and on disk, so that a resumed run does not pay twice."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO, final

from trainer.files import make_directory

SHOWN_KEY_CHARS: Final = 32


@final
class AnswerCache:
    """Maps the content of a question to its answer; threads share it.

    On disk each process appends to a file of its own, so that ranks and runs can share a directory; a line that a kill
    has cut off is left out. A line is `{"key": "5e88...", "answer": {"reason": "...", "score": 7}, "usage": {...}}`.
    """

    def __init__(self, directory: Path | None) -> None:
        """Read what the directory has.

        Args:
            directory: where answers are kept; None keeps them in memory only.
        """
        self._directory = directory
        self._lock = threading.Lock()
        self._answers: dict[str, Any] = {}
        self._asked: dict[str, Future[Any]] = {}
        self._file: TextIO | None = None
        for file in sorted(directory.glob("*.jsonl")) if directory is not None else ():
            for record in _records(file):
                if "answer" in record:
                    self._answers[record["key"]] = record["answer"]

    def answer(self, key: str, ask: Callable[[], tuple[Any, Mapping[str, int]]]) -> tuple[Any, bool]:
        """The answer to a question, and whether it was known.

        Two threads that ask the same at the same time ask once. An error is not kept.

        Args:
            key: of `content_key`.
            ask: asks the judge; returns the answer, and its usage of tokens.
        """
        with self._lock:
            if key in self._answers:
                return self._answers[key], True
            asked = self._asked.get(key)
            if asked is None:
                own = self._asked[key] = Future()
        if asked is not None:
            return asked.result(), True
        try:
            found, usage = ask()
        except BaseException as error:
            with self._lock:
                del self._asked[key]
            own.set_exception(error)
            raise
        with self._lock:
            self._answers[key] = found
            del self._asked[key]
            self._write({"key": key, "answer": found, "usage": dict(usage)})
        own.set_result(found)
        return found, False

    def note_spent(self, usage: Mapping[str, int]) -> None:
        """Record the tokens of an answer that could not be used."""
        with self._lock:
            self._write({"usage": dict(usage)})

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._directory = None

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._directory is None:
            return
        if self._file is None:
            make_directory(self._directory)
            name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.jsonl"
            self._file = (self._directory / name).open("x", encoding="ascii")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def content_key(body: Mapping[str, Any]) -> str:
    """Digest of everything that a judge is asked.

    >>> content_key({"model": "m", "messages": []}) == content_key({"messages": [], "model": "m"})
    True
    """
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:SHOWN_KEY_CHARS]


def _records(file: Path) -> list[dict[str, Any]]:
    records = []
    for line in file.read_text(encoding="ascii", errors="replace").split("\n"):
        with suppress(ValueError):  # cut off by a kill
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records
