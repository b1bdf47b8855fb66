"""Tokenizes rows chunk by chunk, in this process or in several; the order of the rows stays."""

from __future__ import annotations

import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Final

from trainer.data.chat import ENCODE_ROWS, ChatEncoder
from trainer.data.token_table import EncodedChunk
from trainer.errors import TrainerError
from trainer.types import Row

MAX_PROCESSES: Final = 32
"""One process reads and writes for all of them."""
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def encode_chunk(encoder: ChatEncoder, rows: Sequence[Row]) -> EncodedChunk:
    """Tokenize some rows; those that are dropped are counted.

    Raises:
        DataError: a row cannot be trained on; names file and line.
    """
    prepared = [encoder.prepare(row) for row in rows]
    kept = [encoder.within_limit(sequences) for sequences in encoder.tokenize(prepared)]
    return EncodedChunk.of(
        [(row, sequences) for row, (sequences, _) in zip(rows, kept, strict=True) if sequences],
        num_read=len(rows),
        num_truncated=sum(was_truncated for _, was_truncated in kept),
        num_respaced=sum(item.is_respaced for item in prepared),
    )


def encode_all(encoder: ChatEncoder, rows: Iterable[Row], num_processes: int) -> Iterator[EncodedChunk]:
    """Tokenize rows in their order.

    Args:
        encoder: is inherited by the processes.
        rows: read as they are needed, a few chunks ahead.
        num_processes: that tokenize, beside this one; 0: this one does.

    Raises:
        DataError: the first row that cannot be read or trained on.
        ChildProcessError: a process died.
    """
    chunks = _chunks(rows)
    if num_processes == 0:
        yield from (encode_chunk(encoder, chunk) for chunk in chunks)
        return
    context = get_context("fork")
    pipes = [context.Pipe() for _ in range(num_processes)]
    ours, theirs = [pipe[0] for pipe in pipes], [pipe[1] for pipe in pipes]
    processes = [
        context.Process(target=_serve, args=(encoder, end, [each for each in (*ours, *theirs) if each is not end]))
        for end in theirs
    ]
    for process in processes:
        process.start()
    for end in theirs:
        end.close()
    try:
        yield from _in_turn(chunks, ours)
    finally:
        for end in ours:
            end.close()
        for process in processes:
            process.join()


def spare_processors() -> int:
    """How many processes can tokenize beside one that reads and writes; 0 on one processor."""
    processors = len(os.sched_getaffinity(0))
    return min(processors, MAX_PROCESSES) if processors > 1 else 0


def _in_turn(chunks: Iterator[Sequence[Row]], ends: Sequence[Connection]) -> Iterator[EncodedChunk]:
    """Deal chunks to idle processes, one to each at a time, and take the results in the order of the chunks.

    An error of reading waits until the rows before it are tokenized, so that the first bad row is the one named.
    """
    idle, busy = deque(ends), deque[Connection]()
    failure: TrainerError | None = None
    is_read = False
    result: EncodedChunk | None = None
    while True:
        while idle and not is_read:
            try:
                chunk = next(chunks, None)
            except TrainerError as error:
                failure, chunk = error, None
            is_read = chunk is None
            if chunk is not None:
                idle[0].send(chunk)
                busy.append(idle.popleft())
        if result is not None:  # after dealing, so that no process waits while it is written
            yield result
        if not busy:
            break
        result = _result_of(busy[0])
        idle.append(busy.popleft())
    if failure is not None:
        raise failure


def _result_of(end: Connection) -> EncodedChunk:
    try:
        result = end.recv()
    except EOFError:
        raise ChildProcessError("a process that tokenizes rows died; it may have run out of memory") from None
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, EncodedChunk), "processes answer with a chunk or an error"
    return result


def _serve(encoder: ChatEncoder, end: Connection, others: Sequence[Connection]) -> None:
    """Tokenize chunks until the other end is closed, which it is too when its process dies."""
    for each in others:  # a copy kept open here would hide that
        each.close()
    ignore_stop_signals()
    try:
        while True:
            rows = end.recv()
            try:
                end.send(encode_chunk(encoder, rows))
            except TrainerError as error:
                end.send(error)
            except Exception:  # a bug of ours: shown by the process that trains
                end.send(RuntimeError(traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def ignore_stop_signals() -> None:
    """Leave it to the process that trains what a stop request does: a batch system signals all processes at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _chunks(rows: Iterable[Row]) -> Iterator[Sequence[Row]]:
    """Rows in groups; those before an error come before it."""
    iterator = iter(rows)
    while True:
        chunk: list[Row] = []
        failure: TrainerError | None = None
        try:
            for row in islice(iterator, ENCODE_ROWS):
                chunk.append(row)  # one by one: an error leaves those before it
        except TrainerError as error:
            failure = error
        if chunk:
            yield chunk
        if failure is not None:
            raise failure
        if len(chunk) < ENCODE_ROWS:
            return
