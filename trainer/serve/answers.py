"""Responses and stream chunks in OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from itertools import accumulate
from time import time
from typing import Any, Protocol, final

from trainer.serve.choices import Piece, Usage, chat_logprobs, token_text
from trainer.serve.models import Served
from trainer.serve.readers import AnswerReader, Delta
from trainer.serve.reasoning import Reasoning
from trainer.serve.requests import ChatRequest, CompletionRequest


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


def _joined(deltas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole calls, from what a stream would say of them."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({"id": delta["id"], "type": "function", "function": dict(delta["function"])})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


@final
class ChatAnswer:
    """Of /v1/chat/completions."""

    def __init__(self, request: ChatRequest, served: Served, reasoning: Reasoning | None = None) -> None:
        """Choose an id and a time.

        Args:
            request: says which parts are wanted.
            served: the model that answers.
            reasoning: how it is recognised; None leaves it in the content.
        """
        self.served, self.wants_usage = served, request.wants_usage
        self._count, self._has_logprobs = request.num_choices, request.num_logprobs is not None
        has_calls = bool(request.tools) and request.tool_choice != "none"
        self._readers = [AnswerReader(reasoning, has_calls=has_calls) for _ in range(self._count)]
        self._is_plain, self._has_reasoning = reasoning is None and not has_calls, reasoning is not None
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time()), "model": request.model}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role of each choice."""
        for index in range(self._count):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece in a stream."""
        delta, reason = self._read(piece)
        return self._chunk(piece.choice, delta.body(), self._logprobs([piece]), reason)

    def _read(self, piece: Piece) -> tuple[Delta, str | None]:
        """What a piece adds, and the finish reason."""
        if self._is_plain:
            return Delta(content=piece.text), piece.finish_reason
        reader = self._readers[piece.choice]
        delta = reader.feed(piece.text, len(piece.tokens), is_last=piece.finish_reason is not None)
        is_called = reader.num_calls > 0 and piece.finish_reason == "stop"
        return delta, "tool_calls" if is_called else piece.finish_reason

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk at the end of a stream."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(usage)}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        if not self._has_reasoning:
            return usage.body()
        tokens = sum(reader.num_reasoning_tokens for reader in self._readers)
        return {**usage.body(), "completion_tokens_details": {"reasoning_tokens": tokens}}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """A response that is no stream."""
        choices = [self._choice(index, part) for index, part in enumerate(_by_choice(pieces, self._count))]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(usage)}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        parts = [self._read(piece) for piece in pieces]
        text = "".join(delta.content for delta, _ in parts)
        calls = _joined([call for delta, _ in parts for call in delta.calls])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        if reasoning := "".join(delta.reasoning for delta, _ in parts):
            message["reasoning_content"] = reasoning
        logprobs = self._logprobs(pieces)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": parts[-1][1]}

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
        self._echoed = request.prompts if request.echo else []
        self._num_choices = request.num_choices
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
        prompt = self._echoed[index // self._num_choices] if self._echoed else ""
        begun = prompt if isinstance(prompt, str) else self.served.tokenizer.decode(prompt)
        choice = {
            "index": index,
            "text": begun + "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(prompt, pieces) if self._has_logprobs else None,
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

    def _logprobs(self, prompt: str | Sequence[int], pieces: Sequence[Piece]) -> dict[str, Any]:
        """Of the prompt, where it is repeated, whose first token has none, and of the completion."""
        known = [(token.token, token.report) for piece in pieces for token in piece.tokens if token.report is not None]
        ids: Sequence[int] = []
        if self._echoed:
            ids = self.served.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        found = [*zip(ids, [None, *pieces[-1].prompt_logprobs], strict=False), *known]
        texts = [token_text(self.served, token) for token, _ in found]
        return {
            "tokens": texts,
            "token_logprobs": [None if report is None else report["logprob"] for _, report in found],
            "top_logprobs": [
                None if report is None else {self._name(other): value for other, value in report["top"]}
                for _, report in found
            ],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }


def _prompt_entry(token: int, report: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of one place in a prompt, by token id; that of the token itself is always there."""
    places = {token: report["logprob"], **dict(report["top"])}
    return {str(each): {"logprob": logprob} for each, logprob in places.items()}
