"""Reads tool calls from a turn's text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen.

An opening mark without a call that can be read is `unclosed` or `invalid_json`, never plain text: the policy tried to
call, and the recipe decides what it gets back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from trainer.types import ToolCall

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


@final
@dataclass(frozen=True)
class ParsedTurn:
    """A turn's text, taken apart."""

    message: Mapping[str, Any]
    """The assistant's message. Its content is the whole text where a call could not be read, so that a template shows
    the policy what it wrote."""
    calls: tuple[ToolCall, ...] = ()


def parse_turn(text: str) -> ParsedTurn:
    """The message and the calls of a turn, before names and arguments are checked.

    >>> parse_turn('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>').calls[0].arguments
    {'a': 1}
    >>> parse_turn("<tool_call>{'name': 'add'}</tool_call>").calls[0].status
    'invalid_json'
    >>> parse_turn('<tool_call>{"name": "add"').calls[0].status
    'unclosed'
    """
    content, *pieces = text.split(OPEN)
    calls: list[ToolCall] = []
    for number, piece in enumerate(pieces):
        body, mark, rest = piece.partition(CLOSE)
        call = _call(f"call_{number}", body)
        if not mark:
            call = ToolCall(call.id, call.name, {}, "unclosed", f"the call does not end with {CLOSE}")
        calls.append(call)
        content += rest
    if any(call.status != "ok" for call in calls):
        return ParsedTurn({"role": "assistant", "content": text}, tuple(calls))
    message: dict[str, Any] = {"role": "assistant", "content": content.strip() if calls else text}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in calls
        ]
    return ParsedTurn(message, tuple(calls))


def _call(identity: str, body: str) -> ToolCall:
    try:
        call = json.loads(body)
    except ValueError as error:
        return ToolCall(identity, "", {}, "invalid_json", f"the call is no JSON: {error}")
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str):
        return ToolCall(identity, "", {}, "invalid_json", 'the call is no object with "name" and "arguments"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(identity, name, {}, "bad_arguments", '"arguments" is no object')
    return ToolCall(identity, name, arguments, "ok")


def same_turn(one: str, two: str) -> bool:
    r"""Whether two texts say the same, up to white space and the spelling of a call's JSON.

    >>> same_turn('<tool_call>{"name":"f","arguments":{}}</tool_call>', '<tool_call>\n{"name": "f"}\n</tool_call>')
    True
    >>> same_turn("<think>2+2</think>4", "4")
    False
    """
    first, second = parse_turn(one), parse_turn(two)
    return _squashed(first) == _squashed(second) and first.calls == second.calls


def _squashed(turn: ParsedTurn) -> str:
    return "".join(str(turn.message["content"]).split())
