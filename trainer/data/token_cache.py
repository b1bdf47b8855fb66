"""Tokenized rows on disk, so that a second start reads them instead of tokenizing again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, final

from trainer.config.recipe import DataSource
from trainer.config.source_files import source_files
from trainer.data.chat import ChatEncoder
from trainer.data.row_encoder import encode_all, ignore_stop_signals, spare_processors
from trainer.data.sources import stream_rows
from trainer.data.token_table import TableWriter, TokenTable
from trainer.errors import DataError, TrainerError
from trainer.files import fsync_dir, fsync_file, make_directory
from trainer.planning.identity import source_digest
from trainer.types import Row

FORMAT: Final = 1
LIBRARIES: Final = ("transformers", "tokenizers", "jinja2", "numpy")
"""Another version of these, or of the modules of this package, may yield other tokens."""
FEW_ROWS: Final = 4096
"""Up to so many rows are tokenized in this process: starting others would take longer."""
REPORT_S: Final = 0.5
STOP_S: Final = 4 * REPORT_S
"""How long the process that tokenizes has to notice that nobody listens any more."""
ABANDONED_S: Final = 3600.0
"""A directory that no process has written to for this long was left by one that was killed."""
COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@final
@dataclass(frozen=True)
class RowRequest:
    """Which rows are tokenized, by what, and where the result is kept."""

    cache: Path
    """Directory of all tables."""
    encoder: ChatEncoder
    source: DataSource
    limit: int | None = None
    """Only the first rows."""

    def rows(self) -> Iterator[Row]:
        """Read the rows."""
        return stream_rows(self.source, self.encoder.data, self.limit)


@final
@dataclass(frozen=True)
class TokenizingState:
    """How far it is: 5,000 rows are done; or all are, in this directory."""

    num_rows: int
    directory: Path | None = None
    """The table, once it is complete."""


def tokenize_rows(request: RowRequest, *, few_rows: int = FEW_ROWS) -> Generator[TokenizingState, None, None]:
    """Yield the progress at least every few seconds, in the end the directory of a complete `TokenTable`.

    A generator that is closed before its end stops the work and removes what was written, but for a table that was
    completed meanwhile: the next start uses it.

    Args:
        request: what is tokenized.
        few_rows: up to so many rows are tokenized in this process, more in others.

    Raises:
        DataError: a row cannot be trained on; names file and line.
        OSError: the cache cannot be written.
    """
    target = request.cache / _key(request)
    if _is_reusable(request.source) and _is_complete(target):
        yield TokenizingState(0, target)
        return
    rows = request.rows()
    first = list(islice(rows, few_rows + 1))
    if len(first) <= few_rows:
        yield from _written(request, first, target, num_processes=0)
    else:
        del rows, first
        yield from _written_by_others(request, target)


def _written(
    request: RowRequest, rows: Iterable[Row], target: Path, *, num_processes: int
) -> Generator[TokenizingState, None, None]:
    """Write a table and move it to its place; another process that was faster is left its own."""
    make_directory(request.cache)
    _remove_abandoned(request.cache)
    temporary = _temporary(target, os.getpid())
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with TableWriter(temporary) as writer:
            reported = time.monotonic()
            for chunk in encode_all(request.encoder, rows, num_processes):
                writer.append(chunk)
                if time.monotonic() - reported > REPORT_S:
                    yield TokenizingState(writer.counts.num_read)
                    reported = time.monotonic()
            counts = writer.counts
            if not counts.num_read:
                name = request.source.path or request.source.hub
                raise DataError(f"{name}: holds no rows. Give a file with one JSON object a line.")
            if not writer.num_rows:
                limit = request.encoder.data.max_seq_tokens
                raise DataError(f"none of {counts.num_read:,} rows is within data.max_seq_tokens ({limit:,})")
            writer.finish()
        for file in temporary.iterdir():
            fsync_file(file)
        fsync_dir(temporary)
        _move(temporary, target, keep_other=_is_reusable(request.source))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    yield TokenizingState(counts.num_read, target)


def _temporary(target: Path, process: int | None) -> Path:
    """Where a process writes a table before it is complete."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{process}.tmp")


def _move(temporary: Path, target: Path, *, keep_other: bool) -> None:
    if target.exists() and not (keep_other and _is_complete(target)):
        retired = temporary.with_suffix(".old")
        target.rename(retired)  # a process that has mapped it keeps its files until it ends
        shutil.rmtree(retired, ignore_errors=True)
    try:
        temporary.rename(target)
    except OSError:
        if not _is_complete(target):
            raise
    fsync_dir(target.parent)


def _written_by_others(request: RowRequest, target: Path) -> Iterator[TokenizingState]:
    """Write a table in a process of its own, which starts more, so that this one stays small and can stop them."""
    context = get_context("spawn")  # a fork of this process would hold its locks and threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_write, args=(request, target, theirs), name="tokenizing")
    process.start()
    theirs.close()
    try:
        state = TokenizingState(0)
        while state.directory is None:
            if ours.poll(REPORT_S):
                try:
                    message = ours.recv()
                except EOFError:
                    raise ChildProcessError("the process that tokenizes rows died; see the log") from None
                if isinstance(message, BaseException):
                    raise message
                state = message
            yield state
    finally:
        ours.close()
        process.join(STOP_S)
        process.kill()
        process.join()
        shutil.rmtree(_temporary(target, process.pid), ignore_errors=True)


def _write(request: RowRequest, target: Path, end: Connection) -> None:
    """Write a table and report on the way; ends where nobody listens any more."""
    ignore_stop_signals()
    try:
        with closing(_written(request, request.rows(), target, num_processes=spare_processors())) as states:
            for state in states:
                end.send(state)
    except BrokenPipeError:
        return
    except (TrainerError, OSError) as error:
        end.send(error)
    except Exception:  # a bug of ours: shown by the process that trains
        end.send(RuntimeError(traceback.format_exc()))


def _key(request: RowRequest) -> str:
    """Digest of everything that decides the tokens, and of the names that messages show."""
    encoder = request.encoder
    tokenizer = encoder.tokenizer
    tokenizer("a")  # padding and truncation of an earlier use are part of the tokenizer's text
    settings = encoder.data.model_dump(exclude={"train", "eval", "eval_frac", "eval_rows"})
    parts = {
        "format": FORMAT,
        "rows": source_digest(request.source),
        "source": request.source.model_dump(),
        "limit": request.limit,
        "settings": settings,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "stop": sorted(encoder.stop_ids),
        "embedding": encoder.num_embeddings,
        "versions": {name: version(name) for name in LIBRARIES},
        "modules": _modules_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _modules_digest() -> str:
    """Digest of the modules that make tokens of rows: another version of them gets tables of its own."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in {".py", ".jinja"}:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_reusable(source: DataSource) -> bool:
    """Whether the digest of the source says what its rows are: not where a hub may have replaced them."""
    return all(source_files(each) or COMMIT.fullmatch(each.revision or "") for each in source.sources or [source])


def _is_complete(directory: Path) -> bool:
    try:
        TokenTable(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes left."""
    for directory in chain(cache.glob(".*.tmp"), cache.glob(".*.old")):
        newest = max((file.stat().st_mtime for file in directory.iterdir()), default=directory.stat().st_mtime)
        if time.time() - newest > ABANDONED_S:
            shutil.rmtree(directory, ignore_errors=True)
