"""The forms of rows that are read, recognised by their fields. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from trainer.config.recipe import DataSettings
from trainer.data.messages import TRAIN_FLAGS, read_message, read_tools
from trainer.errors import DataError
from trainer.types import Row

SYSTEM_FIELDS: Final = ("system", "system_prompt")
CHATS: Final = ("messages", "conversations", "conversation")
INPUTS: Final = ("input", "context")
OUTPUTS: Final = ("output", "response")
PREFERENCES: Final = ("chosen", "rejected", "preferred_output", "non_preferred_output")
RESERVED_ARGUMENTS: Final = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "chat_template",
    "conversations",
}


@final
@dataclass(frozen=True)
class Conversation:
    r"""A row as a chat, whatever form it was written in.

    The row `{"instruction": "Add.", "input": "1 2", "output": "3"}` becomes the messages
    `[{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]`,
    the form "alpaca: instruction + input -> prompt, output -> completion" and the uses
    `{"instruction": "prompt", "input": "prompt", "output": "trained"}`.
    """

    form: str
    messages: list[dict[str, Any]]
    uses: Mapping[str, str]
    """What each field of the row that was read became."""
    tools: list[dict[str, Any]] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """The row's `chat_template_kwargs`: further variables of the chat template."""
    only_last: bool = False
    """The row says `mask_history: true`: only its last turn is trained."""


@final
@dataclass(frozen=True)
class PlainText:
    """A row of `format: text`: the completion follows the prompt as it stands."""

    form: str
    prompt: str
    completion: str
    uses: Mapping[str, str]


def read_conversation(row: Row, settings: DataSettings, *, with_completion: bool) -> Conversation:
    """Read the row as a chat.

    Args:
        row: in any form that is read.
        settings: for the default system message, column names and trained roles.
        with_completion: whether the chat must end with what is trained (sft) or with a user turn (rft).

    Raises:
        DataError: the row has no form that is read, an unknown role, or the wrong last turn.
    """
    row = without_ignored(row, settings)
    if with_completion:
        refuse_preference(row)
    form, messages, uses = _chat_of(row, settings, with_completion=with_completion)
    messages = _with_system(row, settings, messages, uses)
    tools = row.get("tools")
    if tools and form.startswith("ShareGPT") and isinstance(tools, str):
        tools = _parsed_tools(row, tools)
    tools = read_tools(row, tools)
    if tools:
        uses["tools"] = "prompt"
    arguments = row.get("chat_template_kwargs")
    if arguments:
        if not isinstance(arguments, Mapping) or RESERVED_ARGUMENTS & arguments.keys():
            raise DataError(f"{row}: `chat_template_kwargs` must be an object of template variables")
        uses["chat_template_kwargs"] = "template"
    only_last = with_completion and row.get("mask_history") is True
    if with_completion and "mask_history" in row:
        if row["mask_history"] not in (True, False, None):
            raise DataError(f"{row}: `mask_history` must be true or false (got {row['mask_history']!r:.60})")
        uses["mask_history"] = "loss mask"
    if not (with_completion and isinstance(settings.train_on, list)):
        _refuse_wrong_end(row, messages, with_completion=with_completion)
    return Conversation(form, messages, uses, tools, {**settings.chat_template_kwargs, **(arguments or {})}, only_last)


def row_messages(row: Row, settings: DataSettings, *, with_completion: bool) -> list[dict[str, Any]]:
    """The messages of the row as a chat; see `read_conversation`."""
    return read_conversation(row, settings, with_completion=with_completion).messages


def read_plain_text(row: Row, settings: DataSettings) -> PlainText:
    """Read a row of `format: text`.

    Raises:
        DataError: the row has neither `prompt` and `completion`, nor `text`, or nothing to train.
    """
    row = without_ignored(row, settings)
    refuse_preference(row)
    if "prompt" in row or "completion" in row:
        form = "prompt and completion"
        prompt, completion = row.get("prompt"), row.get("completion")
        uses = {"prompt": "prompt", "completion": "trained"}
    elif "text" in row:
        form, prompt, completion, uses = "text: all of it is trained", "", row["text"], {"text": "trained"}
    elif isinstance(row.get("instruction"), str):
        prompt, output, uses = _alpaca(row)
        form, completion = _alpaca_form(row), row.get(output)
        uses[output] = "trained"
    else:
        prompt = completion = None
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{row}: `format: text` needs the texts `prompt` and `completion`, or `text`")
    if not completion.strip():
        raise DataError(f"{row}: the completion is empty. Remove the row.")
    return PlainText(form, prompt, completion, uses)


def row_weight(row: Row) -> float:
    """The row's own `weight`, a factor on the loss of its tokens; 1 where it has none.

    Raises:
        DataError: it is not a number of 0 or more.
    """
    weight = row.get("weight")
    if weight is None:
        flags = {name: row[name] for name in TRAIN_FLAGS if row.get(name) is not None}
        for name, value in flags.items():
            if not isinstance(value, bool | int) or value not in (0, 1):
                raise DataError(
                    f"{row}: `{name}` must be true or false (got {value!r:.60}). Remove it, or use `weight`."
                )
        return float(min(flags.values(), default=1))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise DataError(f"{row}: weight must be a number of 0 or more (got {weight!r})")
    return float(weight)


def without_ignored(row: Row, settings: DataSettings) -> Row:
    """The row without the fields that `data.ignore` lists."""
    if not any(name in row for name in settings.ignore):
        return row
    kept = {name: value for name, value in row.items() if name not in settings.ignore}
    return Row(kept, row.file, row.line, row.index)


def refuse_preference(row: Row) -> None:
    """Refuse pairs of a better and a worse answer: sft would train one of them without a word."""
    found = [name for name in PREFERENCES if row.get(name) is not None]
    if found:
        raise DataError(
            f"{row}: a preference pair (`{'`, `'.join(found)}`); preference training is not supported. To train the "
            f"better answers alone, set data.columns to {{completion: {found[0]}}} and data.ignore to "
            f"[{', '.join(found)}]."
        )
    if isinstance(row.get("label"), bool) and "completion" in row:
        raise DataError(
            f"{row}: `label: true or false` beside a completion marks good and bad answers, and sft trains both. "
            "Keep the good rows only, and set data.ignore to [label]."
        )


Read = tuple[str, list[dict[str, Any]], dict[str, str]]
"""Form, messages, and the use of each field."""


def _chat_of(row: Row, settings: DataSettings, *, with_completion: bool) -> Read:
    if "messages" in row:
        return _chat_form(row, "messages", settings)
    if "prompt" in row:
        messages = _chat(row, "prompt", "user", settings)
        uses = {"prompt": "prompt"}
        if with_completion:
            if row.get("completion") is None:
                raise DataError(f"{row}: has `prompt` and no `completion`")
            messages += _chat(row, "completion", "assistant", settings)
            uses["completion"] = "trained"
            messages = [*_history(row, uses), *messages]
        return "prompt and completion" if with_completion else "prompt", messages, uses
    for name in CHATS[1:]:
        if name in row:
            return _chat_form(row, name, settings)
    if isinstance(row.get("instruction"), str):
        prompt, output, uses = _alpaca(row)
        messages = [{"role": "user", "content": prompt}]
        if with_completion:
            if not isinstance(row.get(output), str):
                raise DataError(f"{row}: has `instruction` and no text in `{output}`")
            messages = [*_history(row, uses), *messages, {"role": "assistant", "content": row[output]}]
            uses[output] = "trained"
        return _alpaca_form(row), messages, uses
    hint = ""
    if isinstance(row.get("text"), str):
        hint = ". Rows with `text` alone are trained as they are: set `data.format: text`"
    elif row:
        hint = ". Name the fields that hold them in data.columns"
    have = ", ".join(row) or "nothing"
    raise DataError(f"{row}: needs `messages`, or `prompt` and `completion`; it has: {have}{hint}")


def _chat_form(row: Row, name: str, settings: DataSettings) -> Read:
    messages = _chat(row, name, None, settings)
    first = row[name][0]
    is_sharegpt = isinstance(first, Mapping) and "role" not in first
    form = f"ShareGPT: {name} with from and value" if is_sharegpt else f"{name} with role and content"
    return form, messages, {name: "prompt and trained"}


def _chat(row: Row, name: str, role: str | None, settings: DataSettings) -> list[dict[str, Any]]:
    """The messages of a field; a plain text is one message of `role`, where there is one."""
    value = row[name]
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{row}: `{name}` must be {'a text or ' if role else ''}a list of messages (got {found})")
    names = {settings.columns[ours]: ours for ours in ("role", "content") if ours in settings.columns}
    if names:
        value = [
            {names.get(key, key): each for key, each in message.items()} if isinstance(message, Mapping) else message
            for message in value
        ]
    roles = trained_roles(settings)
    ignored = set(settings.ignore) - {"role", "content"}
    if ignored:
        value = [
            {key: each for key, each in message.items() if key not in ignored}
            if isinstance(message, Mapping)
            else message
            for message in value
        ]
    return [read_message(row, message, f"{name}[{index}]", roles) for index, message in enumerate(value)]


def trained_roles(settings: DataSettings) -> tuple[str, ...]:
    """Roles whose turns are trained."""
    return tuple(settings.train_on) if isinstance(settings.train_on, list) else ("assistant",)


def _alpaca(row: Row) -> tuple[str, str, dict[str, str]]:
    """The prompt, the name of the field with the answer, and the uses of instruction and input."""
    output = next((name for name in OUTPUTS if name in row), OUTPUTS[0])
    parts, uses = [row["instruction"]], {"instruction": "prompt"}
    for name in INPUTS:
        if row.get(name):
            if not isinstance(row[name], str):
                raise DataError(f"{row}: `{name}` must be a text (got {type(row[name]).__name__})")
            parts.append(row[name])
            uses[name] = "prompt"
    return "\n\n".join(part for part in parts if part), output, uses


def _alpaca_form(row: Row) -> str:
    given = next((name for name in INPUTS if name in row), INPUTS[0])
    output = next((name for name in OUTPUTS if name in row), OUTPUTS[0])
    return f"alpaca: instruction + {given} -> prompt, {output} -> completion"


def _history(row: Row, uses: dict[str, str]) -> list[dict[str, Any]]:
    """Earlier turns as `[[question, answer], ...]`."""
    history = row.get("history")
    if not history:
        return []
    uses["history"] = "prompt and trained"
    messages = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{row}: `history` must be a list of [question, answer] pairs (got {pair!r:.60})")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _with_system(
    row: Row, settings: DataSettings, messages: list[dict[str, Any]], uses: dict[str, str]
) -> list[dict[str, Any]]:
    own = messages[0]["content"] if messages[0]["role"] in {"system", "developer"} else None
    system = settings.system
    for name in SYSTEM_FIELDS:
        if row.get(name):
            if not isinstance(row[name], str):
                raise DataError(f"{row}: `{name}` must be a text (got {type(row[name]).__name__})")
            if own is not None and own != row[name]:
                raise DataError(
                    f"{row}: has `{name}` and another system message in its chat. "
                    f"Remove one, or set data.ignore to [{name}]."
                )
            system = row[name]
            uses[name] = "prompt"
    if system is not None and own is None:
        return [{"role": "system", "content": system}, *messages]
    return messages


def _parsed_tools(row: Row, text: str) -> Any:
    try:
        tools = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{row}: `tools` is a text that is not JSON: {error.msg} at column {error.colno}") from None
    if isinstance(tools, list):
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools


def _refuse_wrong_end(row: Row, messages: list[dict[str, Any]], *, with_completion: bool) -> None:
    last = messages[-1]
    if with_completion and (last["role"] != "assistant" or last.get("weight", 1) == 0):
        text = f"the last turn is not trained (role {last['role']}); end the row with an assistant turn"
        raise DataError(f"{row}: {text}")
    if not with_completion and last["role"] not in {"user", "tool"}:
        raise DataError(f"{row}: the last turn is by {last['role']}; an rft prompt ends with a user turn")
