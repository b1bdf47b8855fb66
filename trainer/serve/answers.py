"""Responses and stream chunks in OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from time import time
from typing import Any, Protocol, final

from trainer.serve.choices import Piece, Usage, chat_logprobs, token_text
from trainer.serve.models import Served
from trainer.serve.requests import ChatRequest, CompletionRequest
from trainer.serve.tools import CallReader


class Answer(Protocol):
    """How the pieces of a request are written."""

    served: Served
    wants_usage: bool

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece of a stream."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece in a stream."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk at the end of a stream, where usage was asked for."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """A response that is no stream."""


def _by_choice(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    parts: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        parts[piece.choice].append(piece)
    return parts


@final
class ChatAnswer:
    """Of /v1/chat/completions."""

    def __init__(self, request: ChatRequest, served: Served) -> None:
        """Choose an id and a time.

        Args:
            request: says which parts are wanted.
            served: the model that answers.
        """
        self.served, self.wants_usage = served, request.wants_usage
        self._count, self._has_logprobs = request.num_choices, request.num_logprobs is not None
        has_calls = bool(request.tools) and request.tool_choice != "none"
        self._readers = [CallReader() for _ in range(self._count)] if has_calls else None
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time()), "model": request.model}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role of each choice."""
        for index in range(self._count):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece in a stream."""
        text, calls, reason = self._read(piece)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = calls
        return self._chunk(piece.choice, delta, self._logprobs([piece]), reason)

    def _read(self, piece: Piece) -> tuple[str, list[dict[str, Any]], str | None]:
        """Content, calls and finish reason of a piece."""
        if self._readers is None:
            return piece.text, [], piece.finish_reason
        reader = self._readers[piece.choice]
        text, calls = reader.feed(piece.text)
        if piece.finish_reason is None:
            return text, calls, None
        is_called = reader.num_calls > 0 and piece.finish_reason == "stop"
        return text + reader.flush(), calls, "tool_calls" if is_called else piece.finish_reason

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk at the end of a stream."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.body()}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """A response that is no stream."""
        choices = [self._choice(index, part) for index, part in enumerate(_by_choice(pieces, self._count))]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.body()}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        parts = [self._read(piece) for piece in pieces]
        calls = [{key: call[key] for key in ("id", "type", "function")} for _, some, _ in parts for call in some]
        text = "".join(text for text, _, _ in parts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        logprobs = self._logprobs(pieces)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": parts[-1][2]}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        return {"content": chat_logprobs(self.served, tokens), "refusal": None}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


@final
class TextAnswer:
    """Of /v1/completions."""

    def __init__(self, request: CompletionRequest, served: Served) -> None:
        """Choose an id and a time.

        Args:
            request: says which parts are wanted.
            served: the model that answers.
        """
        self.served, self.wants_usage = served, request.wants_usage
        self._has_logprobs, self._has_ids = request.logprobs is not None, request.return_token_ids
        self._has_prompt_logprobs = request.prompt_logprobs is not None
        self._names_ids = request.return_tokens_as_token_ids
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time()),
            "model": request.model,
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        """Nothing: a text has no role."""
        yield from ()

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece in a stream."""
        return {**self._head, "choices": [self._choice(piece.choice, [piece])]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk at the end of a stream."""
        return {**self._head, "choices": [], "usage": usage.body()}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """A response that is no stream."""
        count = 1 + max(piece.choice for piece in pieces)
        choices = [self._choice(index, part) for index, part in enumerate(_by_choice(pieces, count))]
        return {**self._head, "choices": choices, "usage": usage.body()}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(pieces) if self._has_logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }
        last = pieces[-1]
        if self._has_ids:
            choice["token_ids"] = [token.token for piece in pieces for token in piece.tokens]
            choice |= {"prompt_token_ids": list(last.prompt), "stop_reason": last.stop_reason}
        if self._has_prompt_logprobs and last.finish_reason is not None:  # as vLLM: nothing of the first token
            known = zip(last.prompt[1:], last.prompt_logprobs, strict=False)
            choice["prompt_logprobs"] = [None, *(_prompt_entry(token, report) for token, report in known)]
        return choice

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._names_ids else token_text(self.served, token)

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens if token.report is not None]
        return {
            "tokens": [self._name(token.token) for token in tokens],
            "token_logprobs": [token.report["logprob"] for token in tokens if token.report is not None],
            "top_logprobs": [
                {self._name(other): logprob for other, logprob in token.report["top"]}
                for token in tokens
                if token.report is not None
            ],
        }


def _prompt_entry(token: int, report: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of one place in a prompt, by token id; that of the token itself is always there."""
    places = {token: report["logprob"], **dict(report["top"])}
    return {str(each): {"logprob": logprob} for each, logprob in places.items()}
