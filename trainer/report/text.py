"""Bounds the length of texts, so that a page stays small; what is cut says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

TEXT_CHARS: Final = 4000
"""Characters of a text that the page has: half from its beginning, half from its end, where the answer often is."""


def shortened(text: str, limit: int = TEXT_CHARS) -> str:
    r"""The text, or its beginning and its end with a note of what is missing.

    >>> shortened("0123456789" * 2, limit=8)
    '0123\n[... 12 of 20 characters left out ...]\n6789'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} of {len(text):,} characters left out ...]\n{text[-half:]}"


def shortened_messages(messages: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The turns of a chat as `role`, `content` and `more` (tool calls and the like, as JSON), each cut to its limit."""
    if messages is None:
        return None
    return [_turn(message) for message in messages]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """One turn; fields that are neither role nor content are kept as JSON.

    >>> _turn({"role": "assistant", "content": None, "tool_calls": [{"id": "7"}]})
    {'role': 'assistant', 'content': '', 'more': '{"tool_calls": [{"id": "7"}]}'}
    """
    content = message.get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content, ensure_ascii=False)
    turn = {"role": str(message.get("role", "")), "content": shortened(text)}
    more = {name: value for name, value in message.items() if name not in {"role", "content"} and value is not None}
    if more:
        turn["more"] = shortened(json.dumps(more, ensure_ascii=False, default=str))
    return turn
