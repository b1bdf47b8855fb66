"""Rows from JSONL files, each with the place it stands at. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.recipe import DataSettings, DataSource
from trainer.errors import DataError
from trainer.types import Row

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_rows(source: DataSource, settings: DataSettings, limit: int | None = None) -> list[Row]:
    """Read every row, or the first `limit`.

    Raises:
        DataError: the file is empty or a line is not a JSON object; names file and line.
    """
    if source.path is not None and Path(source.path).is_file():
        fields = _read_jsonl(Path(source.path))
        name = source.path
    else:
        from trainer.data.hub import read_hub

        fields = read_hub(source)
        name = f"{source.hub}[{source.split}]"
    rows: list[Row] = []
    for line, raw in fields:
        if limit is not None and len(rows) == limit:
            break
        renamed = _rename(raw, settings.columns, f"{name}:{line}")
        rows.append(Row(renamed, file=name, line=line, index=len(rows)))
    if not rows:
        raise DataError(f"{name}: holds no rows. Give a file with one JSON object a line.")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
            except json.JSONDecodeError as error:
                cut = " (the line looks cut off)" if error.pos >= len(line.rstrip()) - 1 else ""
                message = f"{path}:{number}: not JSON: {error.msg} at column {error.colno}{cut}. Mend or remove it."
                raise DataError(message) from None
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
            yield number, value


def _rename(raw: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    if not columns:
        return raw
    missing = [name for name in columns.values() if name not in raw]
    if missing:
        raise DataError(f"{where}: no field `{missing[0]}` (data.columns); the row has: {', '.join(raw)}")
    return {**raw, **{ours: raw[theirs] for ours, theirs in columns.items()}}


def row_messages(row: Row, settings: DataSettings, *, with_completion: bool) -> list[dict[str, Any]]:
    """The row as a chat.

    Args:
        row: has `messages`, or `prompt` (and `completion`).
        settings: for the default system message.
        with_completion: whether the chat must end with what is trained (sft) or with a user turn (rft).

    Raises:
        DataError: the row has neither form, an unknown role, or the wrong last turn.
    """
    if "messages" in row:
        messages = _checked_messages(row)
    elif "prompt" in row:
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if with_completion:
            completion = row.get("completion")
            if completion is None:
                raise DataError(f"{row}: has `prompt` and no `completion`")
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
            messages = messages + answer
    else:
        raise DataError(f"{row}: needs `messages`, or `prompt` and `completion`; it has: {', '.join(row) or 'nothing'}")
    if settings.system is not None and messages and messages[0]["role"] not in {"system", "developer"}:
        messages = [{"role": "system", "content": settings.system}, *messages]
    last = messages[-1]
    if with_completion and (last["role"] != "assistant" or last.get("weight", 1) == 0):
        raise DataError(f"{row}: the last turn is not trained (role {last['role']}); end the row with an assistant turn")
    if not with_completion and last["role"] not in {"user", "tool"}:
        raise DataError(f"{row}: the last turn is by {last['role']}; an rft prompt ends with a user turn")
    return messages


def _checked_messages(row: Row) -> list[dict[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row}: `messages` must be a list of messages")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise DataError(f"{row}: messages[{number}]: unknown role {role!r}; known: {', '.join(ROLES)}")
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"{row}: messages[{number}]: weight must be 0 or 1 (got {message['weight']!r})")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part, row, number) for part in content)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise DataError(f"{row}: messages[{number}]: content must be text (got {type(content).__name__})")
        checked.append({**message, "content": content})
    return checked


def _text_part(part: Any, row: Row, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{row}: messages[{number}]: only text parts are supported (got {part!r:.60})")


def row_weight(row: Row) -> float:
    """The row's own `weight`, 1 where it has none.

    Raises:
        DataError: it is not a number of 0 or more.
    """
    weight = row.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise DataError(f"{row}: weight must be a number of 0 or more (got {weight!r})")
    return float(weight)
