"""The tokenized rows of a run: the main rank tokenizes or finds them, every rank maps them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import final

from trainer.config.length import count_rows
from trainer.config.recipe import DataSource
from trainer.data.chat import ChatEncoder
from trainer.data.token_cache import RowRequest, TokenizingState, tokenize_rows
from trainer.data.token_table import TokenTable
from trainer.errors import PreemptedError, TrainerError
from trainer.run.console import bar
from trainer.run.protocol import TOKENIZING
from trainer.training.attempt import Attempt


@final
@dataclass(frozen=True)
class _Message:
    """What the main rank tells the others: how far it is, or why it stopped."""

    state: TokenizingState | None
    error: Exception | None = None


def open_rows(attempt: Attempt, encoder: ChatEncoder, source: DataSource, name: str, limit: int | None) -> TokenTable:
    """Tokenize rows, or find them where an earlier attempt or another run left them.

    Args:
        attempt: its main rank tokenizes; the others wait for each of its messages.
        encoder: how rows become tokens.
        source: the rows.
        name: what they are, for messages.
        limit: only the first rows; None: all.

    Raises:
        DataError: a row cannot be trained on.
        PreemptedError: a rank was asked to stop meanwhile.
    """
    request = RowRequest(attempt.run.token_cache, encoder, source, limit)
    states = tokenize_rows(request) if attempt.world.is_main else None
    total = count_rows(source) if attempt.world.is_main and limit is None else limit
    try:
        with attempt.position.during(TOKENIZING):
            state = _next_state(attempt, states)
            while state.directory is None:
                if attempt.stop.agreed(attempt.world):
                    raise PreemptedError("stopped while rows were tokenized, before the next step; nothing is lost")
                _show(attempt, name, state.num_rows, total)
                state = _next_state(attempt, states)
    finally:
        if states is not None:
            states.close()
    table = TokenTable(state.directory)
    attempt.say(f"{name}: {_summary(table)}")
    return table


def _next_state(attempt: Attempt, states: Generator[TokenizingState, None, None] | None) -> TokenizingState:
    """The main rank's next state, on every rank; its error too, so that none waits for ever."""
    message = _Message(None)
    if states is not None:
        try:
            message = _Message(next(states))
        except (TrainerError, OSError, RuntimeError) as error:
            message = _Message(None, error)
    message = attempt.world.from_main(message)
    if message.error is not None:
        raise message.error
    assert message.state is not None, "a message without an error has a state"
    return message.state


def _show(attempt: Attempt, name: str, done: int, total: int | None) -> None:
    """Show the progress here, and in the heartbeat to the supervisor and to `trainer status`."""
    if attempt.console is None:
        return
    of_total = f"{done:,}" if total is None else f"{bar(done, total)} {done:,}/{total:,}"
    phase = f"{TOKENIZING} ({name}): {of_total}"
    attempt.position.enter(phase)
    attempt.watchdog.beat()
    attempt.console.show_part(phase)


def _summary(table: TokenTable) -> str:
    counts = table.counts
    text = f"{counts.num_read:,} rows, {counts.num_tokens:,} tokens, {counts.num_trained:,} trained"
    text += f", {counts.num_truncated} truncated" if counts.num_truncated else ""
    text += f", {counts.num_dropped} dropped" if counts.num_dropped else ""
    if counts.num_split:
        text += f", {counts.num_split:,} rows as {counts.num_sequences:,} sequences in all, one per rewritten turn"
    if counts.num_respaced:
        text += f", white space changed by the template in {counts.num_respaced:,} rows"
    return text
