"""Encodes a row with a tiny tokenizer and a chat template; shows what is trained, or the refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import tiny_tokenizer

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder
from trainer.errors import DataError
from trainer.types import Row

TRL = Path(trl.__file__).parent / "chat_templates"
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the web",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "search", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def make_encoder(
    template: str | None = None, *, path: str = "nowhere", tokenizer: Any = None, **data: Any
) -> ChatEncoder:
    tokenizer = tokenizer or tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = (TRL / f"{template}.jinja").read_text(encoding="utf-8")
    return ChatEncoder(tokenizer, ModelSettings(path=path), DataSettings(train=DataSource(path="x"), **data))


def trained(encoder: ChatEncoder, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """What each sequence of the row has before its first trained token, and its trained text."""
    encoded = encoder.encode([Row(fields, file="rows.jsonl", line=5)])
    texts = []
    for sequence in encoded.sequences:
        first = sequence.loss_mask.index(True)
        own = [token for token, is_own in zip(sequence.token_ids, sequence.loss_mask, strict=True) if is_own]
        texts.append((encoder.tokenizer.decode(sequence.token_ids[:first]), encoder.tokenizer.decode(own)))
    return texts


def refusal(encoder: ChatEncoder, fields: dict[str, Any]) -> str:
    with pytest.raises(DataError) as refused:
        encoder.encode([Row(fields, file="rows.jsonl", line=5)])
    assert str(refused.value).startswith("rows.jsonl:5: ")
    return str(refused.value)
