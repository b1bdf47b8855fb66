"""What becomes of each field of a row: trained, prompt, reward only, unread, or refused. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, final

from trainer.config.recipe import DataSettings
from trainer.data.forms import INPUTS, SYSTEM_FIELDS, Conversation, PlainText
from trainer.data.messages import TRAIN_FLAGS
from trainer.errors import DataError
from trainer.types import Row

UNREAD: Final = "unread"
TEXT_FIELDS: Final = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "response",
    "context",
    "history",
    "text",
    "tools",
    "functions",
    "function_call",
    "documents",
    "reasoning",
    "reasoning_content",
    "thinking",
    "thought",
    "chat_template_kwargs",
    "prefix",
    "suffix",
    *SYSTEM_FIELDS,
)
"""Fields that hold text for the model in some format: a row that has one and does not use it is refused."""
MEDIA_FIELDS: Final = ("images", "image", "videos", "video", "audios", "audio")
MASK_FIELDS: Final = (
    "mask_history",
    "mask_prompt",
    "mask_inputs",
    "train_on_inputs",
    "train_on_input",
    "train_on_prompt",
    "completion_mask",
    "assistant_masks",
    "assistant_mask",
    "labels",
    *TRAIN_FLAGS,
)
"""Fields in which other tools say what is trained."""
TOKEN_FIELDS: Final = ("input_ids", "token_ids")


def use_of_fields(row: Row, read: Conversation | PlainText, settings: DataSettings) -> dict[str, str]:
    """The use of every field of an sft row.

    Args:
        row: the row as it was read from the file.
        read: what was made of it.
        settings: names the fields that are ignored, and columns.

    Raises:
        DataError: a field that other tools train on, or mask by, would be ignored; names field and remedy.
    """
    uses = dict(read.uses)
    renamed = {theirs: ours for ours, theirs in settings.columns.items()}
    for ours, theirs in settings.columns.items():  # a nested one uses the field that it is in
        renamed.setdefault(theirs.partition(".")[0], ours)
    for name in row:
        if name in uses:
            continue
        if name in settings.ignore:
            uses[name] = "ignored (data.ignore)"
        elif renamed.get(name) in uses:
            uses[name] = uses[renamed[name]]
        elif _is_empty(row[name]):
            uses[name] = UNREAD
        else:
            uses[name] = _unused(row, name, read, settings)
    return uses


def use_of_prompt_fields(row: Row, read: Conversation, settings: DataSettings) -> dict[str, str]:
    """The use of every field of an rft row; fields that are no part of the prompt are data of the rewards."""
    uses = dict(read.uses)
    for name in row:
        if name in MEDIA_FIELDS and not _is_empty(row[name]) and name not in settings.ignore:
            raise DataError(_media_text(row, name))
        uses.setdefault(name, "ignored (data.ignore)" if name in settings.ignore else "reward only")
    return uses


def _unused(row: Row, name: str, read: Conversation | PlainText, settings: DataSettings) -> str:
    value = row[name]
    if name == "weight" or (name in TRAIN_FLAGS and isinstance(value, bool | int)):
        return "loss weight"
    if name in MEDIA_FIELDS:
        raise DataError(_media_text(row, name))
    if name in TOKEN_FIELDS:
        raise DataError(f"{row}: `{name}`: rows that are tokenized already are not supported; give their text")
    if name in MASK_FIELDS:
        raise DataError(
            f"{row}: `{name}` says what is trained in another tool's form and would be ignored. Use `weight: 0` in "
            f"messages or data.train_on, and set data.ignore to [{name}]."
        )
    if name in TEXT_FIELDS:
        if (
            isinstance(read, Conversation)
            and isinstance(value, str)
            and any(value == message["content"] for message in read.messages)
        ):
            return UNREAD  # a copy of a message
        remedy = "name it in data.columns"
        if name in INPUTS and "instruction" in row and settings.columns:
            remedy = "remove data.columns (instruction, input and output are recognised without)"
        raise DataError(
            f"{row}: `{name}` would not reach the text: the row was read as {read.form}. "
            f"Move it into the messages, {remedy}, or set data.ignore to [{name}]."
        )
    return UNREAD


def _media_text(row: Row, name: str) -> str:
    return (
        f"{row}: `{name}`: only text is trained here, and the row has {name}. "
        f"Remove such rows, or set data.ignore to [{name}]."
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


@final
class FieldTable:
    """Uses of fields, counted over rows."""

    def __init__(self) -> None:
        """Start without rows."""
        self._counts: dict[str, Counter[str]] = {}

    def add(self, uses: Mapping[str, str]) -> None:
        """Count one row."""
        for name, use in uses.items():
            self._counts.setdefault(name, Counter())[use] += 1

    def lines(self) -> list[tuple[str, str]]:
        """Field and use, with counts where rows differ: `("tools", "prompt (12 rows), unread (3 rows)")`."""
        table = []
        for name, counts in self._counts.items():
            if len(counts) == 1:
                use = next(iter(counts))
            else:
                use = ", ".join(f"{each} ({count:,} rows)" for each, count in counts.most_common())
            table.append((name, use))
        return table
