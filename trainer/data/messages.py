"""One message of a chat: role, text, tool calls, and whether it is trained. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from trainer.errors import DataError
from trainer.types import Row

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names of ShareGPT files beside the roles themselves; `function_call` is an assistant turn with one call."""
TRAIN_FLAGS: Final = ("train", "training", "trainable", "loss", "loss_mask", "loss_weight")
"""Fields of other tools that say whether a message is trained."""
PARTIAL_FLAGS: Final = ("train_detail", "training_detail", "mask")
"""Fields that train parts of a message, or whose meaning differs between tools."""
REASONING_FIELDS: Final = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning; templates read any one of them."""


def read_message(row: Row, raw: Any, source: str, trained_roles: Collection[str] = ("assistant",)) -> dict[str, Any]:
    """Check one message and bring it to the OpenAI form.

    Args:
        row: for messages to people.
        raw: the message as the row has it, in the OpenAI or the ShareGPT form.
        source: the message's place in the row, such as `messages[2]`.
        trained_roles: roles whose turns the recipe trains.

    Returns:
        The message with `role`, text `content`, `weight` (0 or 1) only where the row says so, and its other fields.

    Raises:
        DataError: unknown role, content that is not text, or a flag that cannot be honoured.
    """
    if isinstance(raw, Mapping) and "role" not in raw and ("from" in raw or "value" in raw):
        raw = _from_sharegpt(row, raw, source)
    role = raw.get("role") if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping) or role not in ROLES:
        raise DataError(f"{row}: {source}: unknown role {role!r:.60}; known: {', '.join(ROLES)}")
    message = {name: value for name, value in raw.items() if value is not None}
    message = _with_weight(row, message, source, trained_roles)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, row, source) for part in content)
    if content is None and (message.get("tool_calls") or any(message.get(name) for name in REASONING_FIELDS)):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{row}: {source}: content must be text (got {type(content).__name__})")
    message = {**message, "content": content}
    if message.get("tool_calls"):
        message["tool_calls"] = _parsed_calls(message["tool_calls"], row)
    if message.get("function_call"):
        raise DataError(f"{row}: {source}: `function_call` is the old form; write it as `tool_calls`")
    return message


def _from_sharegpt(row: Row, raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    speaker, value = raw.get("from"), raw.get("value")
    rest = {name: each for name, each in raw.items() if name not in {"from", "value"}}
    if speaker == "function_call":
        try:
            call = json.loads(value) if isinstance(value, str) else value
            calls = [{"type": "function", "function": each} for each in (call if isinstance(call, list) else [call])]
        except json.JSONDecodeError as error:
            raise DataError(f"{row}: {source}: `function_call` must be JSON ({error.msg}; got {value!r:.60})") from None
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    if speaker not in ROLES and speaker not in SHAREGPT_ROLES:
        known = ", ".join(("human", "gpt", *ROLES, "function_call", "observation"))
        raise DataError(f"{row}: {source}: unknown role {speaker!r:.60} in `from`; known: {known}")
    return {"role": SHAREGPT_ROLES.get(speaker, speaker), "content": value, **rest}


def _with_weight(row: Row, message: dict[str, Any], source: str, trained_roles: Collection[str]) -> dict[str, Any]:
    """Turn the flags of other tools into `weight`, or refuse them."""
    for name in PARTIAL_FLAGS:
        if message.get(name):
            raise DataError(
                f"{row}: {source}: `{name}` is not supported: a message is trained whole or not at all. "
                "Remove the field and write `weight: 0` or `weight: 1`."
            )
    flags = {name: message[name] for name in ("weight", *TRAIN_FLAGS) if name in message}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            what = "weight" if name == "weight" else f"`{name}`"
            raise DataError(f"{row}: {source}: {what} must be 0 or 1 (got {value!r:.60})")
    if message["role"] not in trained_roles:
        trained = [name for name, value in flags.items() if value == 1 and name != "weight"]
        if trained:
            raise DataError(
                f"{row}: {source}: `{trained[0]}` asks to train a turn by {message['role']}. "
                f"Remove it, or set `data.train_on: [assistant, {message['role']}]`."
            )
    elif len({float(value) for value in flags.values()}) > 1:
        raise DataError(f"{row}: {source}: contradictory: {', '.join(f'{k}: {v}' for k, v in flags.items())}")
    if not flags:
        return message
    kept = {name: value for name, value in message.items() if name not in TRAIN_FLAGS}
    return {**kept, "weight": int(next(iter(flags.values())))}


def _text_part(part: Any, row: Row, source: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{row}: {source}: only text parts are supported (got {part!r:.60})")


def _parsed_calls(calls: Any, row: Row) -> list[dict[str, Any]]:
    """OpenAI writes the arguments of a call as JSON text; templates want the object."""
    if not isinstance(calls, list):
        raise DataError(f"{row}: `tool_calls` must be a list (got {type(calls).__name__})")
    parsed = []
    for call in calls:
        try:
            function = dict(call["function"])
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{row}: a tool call needs function.name and JSON arguments (got {call!r:.80})") from None
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{row}: a tool call needs function.name (got {call!r:.80})")
        if not isinstance(function.get("arguments", {}), Mapping):
            raise DataError(
                f"{row}: the arguments of a call to {function['name']!r} must be a JSON object, "
                f'such as {{"city": "Oslo"}} (got {function["arguments"]!r:.60})'
            )
        parsed.append({**call, "function": {**function, "arguments": function.get("arguments", {})}})
    return parsed


def read_tools(row: Row, raw: Any) -> list[dict[str, Any]] | None:
    """The row's tool definitions, checked.

    Raises:
        DataError: not a list of functions with names.
    """
    if not raw:
        return None
    if not isinstance(raw, list):
        raise DataError(f"{row}: `tools` must be a list (got {type(raw).__name__})")
    for index, tool in enumerate(raw):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{row}: tools[{index}] needs function.name (got {tool!r:.80})")
    return raw
