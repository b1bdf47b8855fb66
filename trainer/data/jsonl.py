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


def read_rows(
    source: DataSource, settings: DataSettings, limit: int | None = None, refused: list[DataError] | None = None
) -> list[Row]:
    """Read every row, or the first `limit`.

    Args:
        source: the file or hub data set.
        settings: how its columns are called.
        limit: how many rows at most.
        refused: takes the mistakes of single lines, which are then left out; without it the first one is raised.

    Raises:
        DataError: the file is empty or a line is not a JSON object; names file and line.
    """
    if source.path is not None and Path(source.path).is_file():
        fields = _read_jsonl(Path(source.path), refused)
        name = source.path
    else:
        from trainer.data.hub import read_hub

        fields = read_hub(source)
        name = f"{source.hub}[{source.split}]"
    rows: list[Row] = []
    for line, raw in fields:
        try:
            renamed = _rename(raw, settings.columns, f"{name}:{line}")
        except DataError as error:
            if refused is None:
                raise
            refused.append(error)
            continue
        rows.append(Row(renamed, file=name, line=line, index=len(rows)))
        if len(rows) == limit:
            break
    if not rows and not refused:
        raise DataError(f"{name}: holds no rows. Give a file with one JSON object a line.")
    return rows


def _read_jsonl(path: Path, refused: list[DataError] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = _parse_line(line, f"{path}:{number}")
            except DataError as error:
                if refused is None:
                    raise
                refused.append(error)
            else:
                yield number, value


def _parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(line.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = " (the line looks cut off)" if is_cut else ""
        message = f"{where}: not JSON: {error.msg} at column {error.colno}{cut}. Mend or remove it."
        raise DataError(message) from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


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
        messages = _chat(row, "messages", None)
    elif "prompt" in row:
        messages = _chat(row, "prompt", "user")
        if with_completion:
            if row.get("completion") is None:
                raise DataError(f"{row}: has `prompt` and no `completion`")
            messages += _chat(row, "completion", "assistant")
    else:
        raise DataError(f"{row}: needs `messages`, or `prompt` and `completion`; it has: {', '.join(row) or 'nothing'}")
    if settings.system is not None and messages and messages[0]["role"] not in {"system", "developer"}:
        messages = [{"role": "system", "content": settings.system}, *messages]
    last = messages[-1]
    if with_completion and (last["role"] != "assistant" or last.get("weight", 1) == 0):
        text = f"the last turn is not trained (role {last['role']}); end the row with an assistant turn"
        raise DataError(f"{row}: {text}")
    if not with_completion and last["role"] not in {"user", "tool"}:
        raise DataError(f"{row}: the last turn is by {last['role']}; an rft prompt ends with a user turn")
    return messages


def _chat(row: Row, field: str, role: str | None) -> list[dict[str, Any]]:
    """The messages of a field; a plain text is one message of `role`, where there is one."""
    value = row[field]
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{row}: `{field}` must be {'a text or ' if role else ''}a list of messages (got {found})")
    return [_message(row, message, f"{field}[{number}]") for number, message in enumerate(value)]


def _message(row: Row, raw: Any, where: str) -> dict[str, Any]:
    role = raw.get("role") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or role not in ROLES:
        raise DataError(f"{row}: {where}: unknown role {role!r:.60}; known: {', '.join(ROLES)}")
    message = {name: value for name, value in raw.items() if value is not None}  # Arrow fills absent fields with null
    if message.get("weight", 1) not in (0, 1):
        raise DataError(f"{row}: {where}: weight must be 0 or 1 (got {message['weight']!r})")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, row, where) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{row}: {where}: content must be text (got {type(content).__name__})")
    return {**message, "content": content}


def _text_part(part: Any, row: Row, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{row}: {where}: only text parts are supported (got {part!r:.60})")


def row_weight(row: Row) -> float:
    """The row's own `weight`, 1 where it has none.

    Raises:
        DataError: it is not a number of 0 or more.
    """
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise DataError(f"{row}: weight must be a number of 0 or more (got {weight!r})")
    return float(weight)
