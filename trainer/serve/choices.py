"""Sequences of one request as they run: tokens to text, and what is reported about them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

from trainer.engine.protocol import Sampling
from trainer.serve.api_errors import ApiError
from trainer.serve.engine import Engine
from trainer.serve.engine_client import Token
from trainer.serve.models import Served
from trainer.serve.reasoning import Reasoning
from trainer.serve.text import TextStream

LogProbs: TypeAlias = dict[str, Any]


@final
@dataclass(frozen=True)
class Job:
    """One sequence that a request asks for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    served: Served
    stops: Sequence[str] = ()
    reasoning: Reasoning | None = None
    """How the answer shows reasoning; None: not at all."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens that are part of the text: they begin or end reasoning and calls."""
    skip_special_tokens: bool = True
    """Also of the text in which `stops` are looked for."""


@final
@dataclass(frozen=True)
class Piece:
    """What a token added to one choice; the last piece has a finish reason."""

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | None = None
    """Stop string that ended the choice."""
    prompt_logprobs: tuple[LogProbs, ...] = ()
    """Of the last piece, where they were asked for: of each token of the prompt but the first."""
    prompt: tuple[int, ...] = ()
    """Of the last piece: the prompt's tokens."""


@final
@dataclass
class Usage:
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    version: str | None = field(default=None)

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def run_one(engine: Engine, job: Job, choice: int, usage: Usage) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of one sequence.

    Args:
        engine: continues token sequences.
        job: the sequence.
        choice: its index in the response.
        usage: is added to.

    Raises:
        ApiError: the engine refuses it.
    """
    text = TextStream(
        job.served.tokenizer, job.stops, skip_special_tokens=job.skip_special_tokens, shown_ids=job.shown_ids
    )
    held: list[Token] = []
    async with aclosing(engine.generate(job.prompt, job.sampling, job.served.adapter)) as events:
        async for event in events:
            if not isinstance(event, Token):
                usage.cached_tokens += event.cached_tokens
                usage.version = event.version
                yield Piece(choice, text.flush(), tuple(held), event.reason, None, event.prompt_logprobs, job.prompt)
                return
            usage.completion_tokens += 1
            held.append(event)
            ready = text.feed(event.token)
            if text.is_stopped:
                usage.version = job.served.version  # the engine says it at ends of its own only
                yield Piece(choice, text.flush(), tuple(held), "stop", text.stopped_by, (), job.prompt)
                return
            if ready or event.report is not None:
                yield Piece(choice, ready, tuple(held))
                held = []


async def run_all(engine: Engine, jobs: Sequence[Job], usage: Usage) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of several sequences as they come; closing the iterator cancels all.

    Raises:
        ApiError: the engine refuses one.
    """
    if len(jobs) == 1:
        async with aclosing(run_one(engine, jobs[0], 0, usage)) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[Piece | ApiError] = asyncio.Queue()

    async def run(choice: int, job: Job) -> None:
        try:
            async with aclosing(run_one(engine, job, choice, usage)) as pieces:
                async for piece in pieces:
                    queue.put_nowait(piece)
        except ApiError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(run(choice, job)) for choice, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            found = await queue.get()
            if isinstance(found, ApiError):
                raise found
            piece = found
            left -= piece.finish_reason is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def samples(job: Job, count: int) -> list[Job]:
    """`n` sequences of one prompt, each with noise of its own."""
    return [replace(job, sampling=replace(job.sampling, sample=index)) for index in range(count)]


def chat_logprobs(served: Served, tokens: Sequence[Token]) -> list[LogProbs]:
    """`logprobs.content` of a chat."""
    return [
        {
            **_entry(served, token.token, token.report["logprob"]),
            "top_logprobs": [_entry(served, other, logprob) for other, logprob in token.report["top"]],
        }
        for token in tokens
        if token.report is not None
    ]


def _entry(served: Served, token: int, logprob: float) -> LogProbs:
    text = token_text(served, token)
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def token_text(served: Served, token: int) -> str:
    """One token as text; half a character is shown as U+FFFD."""
    text = served.tokenizer.decode([token])
    assert isinstance(text, str)
    return text
