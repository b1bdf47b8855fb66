"""Separate the text of an answer, as it comes, into reasoning, content and calls of tools."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Final, final

from trainer.serve.reasoning import Reasoning, Stage
from trainer.serve.structure import CALL_TAGS
from trainer.serve.text import overlap

OPEN, CLOSE = CALL_TAGS
HEAD: Final = re.compile(r'<tool_call>\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@final
@dataclass
class Delta:
    """What a piece of text adds to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Of OpenAI's form: the first of a call has its name, the others pieces of its arguments."""

    def body(self) -> dict[str, Any]:
        """`delta` of a chunk."""
        parts = {"reasoning_content": self.reasoning, "content": self.content, "tool_calls": self.calls}
        return {name: value for name, value in parts.items() if value}


@final
class ReasoningReader:
    """Separates reasoning from what follows it; the line breaks between them belong to neither."""

    def __init__(self, reasoning: Reasoning) -> None:
        """Begin before the first token."""
        self._form, self._held = reasoning.form, ""
        self._is_undecided = reasoning.stage is Stage.MAY_OPEN
        self._is_inside = reasoning.stage is Stage.IS_OPEN
        self._is_behind = False
        self._is_begun = False

    @property
    def is_inside(self) -> bool:
        """Whether the text so far ends within reasoning."""
        return self._is_inside

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and content that are certain now."""
        self._held += text
        if self._is_undecided:
            begun, form = self._held.lstrip(), self._form.open
            if not begun.startswith(form) and form.startswith(begun):
                return "", ""
            self._is_undecided, self._is_inside = False, begun.startswith(form)
            self._held = begun.removeprefix(form) if self._is_inside else self._held
        reasoning = self._reasoning() if self._is_inside else ""
        return reasoning, "" if self._is_inside else self._content()

    def flush(self) -> tuple[str, str]:
        """What was held back, once no text follows."""
        rest, self._held = self._held, ""
        return (rest.rstrip("\n"), "") if self._is_inside else ("", rest)

    def _reasoning(self) -> str:
        if not self._is_begun:
            self._held = self._held.lstrip("\n")
        at = self._held.find(self._form.close)
        if at >= 0:
            ready, self._held = self._held[:at].rstrip("\n"), self._held[at + len(self._form.close) :]
            self._is_inside, self._is_behind = False, True
            return ready
        sure = self._held[: len(self._held) - overlap(self._held, self._form.close)].rstrip("\n")
        self._is_begun = self._is_begun or bool(sure)
        self._held = self._held[len(sure) :]
        return sure

    def _content(self) -> str:
        ready, self._held = self._held, ""
        if self._is_behind:
            ready = ready.lstrip("\n")
            self._is_behind = not ready
        return ready


@final
class CallReader:
    """Separates calls from the text around them: the name as soon as it is known, then the arguments as they come."""

    def __init__(self) -> None:
        """Begin before the first token."""
        self._held = ""
        self._arguments: ObjectEnd | None = None
        self._is_closing = False
        self.num_calls = 0

    def feed(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Content, and what is added to calls, that are certain now."""
        self._held += text
        content, calls = "", []
        while True:
            if self._arguments is not None:
                piece = self._held[: self._arguments.feed(self._held)]
                self._held = self._held[len(piece) :]
                if piece:
                    calls.append({"index": self.num_calls - 1, "function": {"arguments": piece}})
                if not self._arguments.is_over:
                    break
                self._arguments, self._is_closing = None, True
            if self._is_closing:
                at = self._held.find(CLOSE)
                if at < 0:
                    break
                self._held, self._is_closing = self._held[at + len(CLOSE) :].lstrip("\n"), False
            at = self._held.find(OPEN)
            sure = at if at >= 0 else len(self._held) - overlap(self._held, OPEN)
            ready, self._held = self._held[:sure], self._held[sure:]
            content += ready.lstrip("\n") if self.num_calls else ready
            head = HEAD.match(self._held)
            if head is None:
                break
            calls.append(self._begin(head))
        return content, calls

    def flush(self) -> str:
        """What was cut before the name of a call was known is content."""
        rest, self._held = self._held, ""
        return "" if self._is_closing or self._arguments is not None else rest

    def _begin(self, head: re.Match[str]) -> dict[str, Any]:
        self._held, self._arguments = self._held[head.end() :], ObjectEnd()
        index, self.num_calls = self.num_calls, self.num_calls + 1
        function = {"name": json.loads(f'"{head[1]}"'), "arguments": ""}
        return {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


@final
class ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        """Begin before its first brace."""
        self._depth, self._is_text, self._is_escaped = 0, False, False
        self.is_over = False

    def feed(self, text: str) -> int:
        """Characters of a piece that belong to the object."""
        for index, letter in enumerate(text):
            if self._is_text:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._is_text = False
            elif letter == '"':
                self._is_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_over = True
                    return index + 1
        return len(text)


@final
class AnswerReader:
    """All of it for one choice."""

    def __init__(self, reasoning: Reasoning | None, *, has_calls: bool) -> None:
        """Begin before the first token.

        Args:
            reasoning: None leaves it in the content.
            has_calls: whether calls are read.
        """
        self._reasoning = None if reasoning is None else ReasoningReader(reasoning)
        self._calls = CallReader() if has_calls else None
        self.num_reasoning_tokens = 0

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return 0 if self._calls is None else self._calls.num_calls

    def feed(self, text: str, num_tokens: int, *, is_last: bool) -> Delta:
        """What a piece adds.

        Args:
            text: of the piece.
            num_tokens: of the piece.
            is_last: no text follows.
        """
        delta = Delta(content=text)
        if self._reasoning is not None:
            is_inside = self._reasoning.is_inside
            delta.reasoning, delta.content = self._reasoning.feed(text)
            if is_last:
                reasoning, content = self._reasoning.flush()
                delta.reasoning, delta.content = delta.reasoning + reasoning, delta.content + content
            self.num_reasoning_tokens += num_tokens if is_inside or self._reasoning.is_inside else 0
        if self._calls is not None:
            delta.content, delta.calls = self._calls.feed(delta.content)
            delta.content += self._calls.flush() if is_last else ""
        return delta
