"""Every example of docs/data.md is a row that is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from tiny import tiny_tokenizer

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder
from trainer.data.fields import MEDIA_FIELDS, UNREAD
from trainer.types import Row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```json ?(\w*)\n(.*?)```", PAGE, re.DOTALL)
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def rows_of(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a block, each of one or several lines."""
    decoder, rows, text = json.JSONDecoder(), [], text.strip()
    while text:
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:].strip()
    return rows


def encoder_for(kind: str) -> ChatEncoder:
    tokenizer = tiny_tokenizer()
    if kind == "qwen3":
        tokenizer.chat_template = QWEN3
    data = DataSettings(train=DataSource(path="x"), format="text" if kind == "text" else "chat")
    return ChatEncoder(tokenizer, ModelSettings(path="nowhere"), data)


def test_the_page_has_examples_of_each_kind():
    assert sorted(kind for kind, _ in BLOCKS) == ["", "", "qwen3", "qwen3", "text"]


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
def test_examples_are_trained_and_all_of_their_fields_are_read(kind, block):
    encoder = encoder_for(kind)
    for fields in rows_of(block):
        assert UNREAD not in encoder.prepare(Row(fields)).uses.values()
        assert encoder.encode([Row(fields)]).num_rows == 1


def test_the_forms_are_the_same_row():
    encoder = encoder_for("")
    first, *others = [encoder.encode([Row(fields)]).sequences for fields in rows_of(BLOCKS[0][1])]
    assert len(others) == 5
    assert all(sequences == first for sequences in others)


def test_reasoning_makes_a_sequence_of_each_turn_and_a_turn_of_weight_0_is_not_trained():
    by_kind = {kind: rows_of(block)[0] for kind, block in BLOCKS[::-1] if "reasoning" in block or "weight" in block}
    assert encoder_for("qwen3").encode([Row(by_kind["qwen3"])]).num_split == 1
    encoder = encoder_for("")
    (sequence,) = encoder.encode([Row(by_kind[""])]).sequences
    own = [token for token, is_own in zip(sequence.token_ids, sequence.trained, strict=True) if is_own]
    assert encoder.tokenizer.decode(own) == "No: Lima.<|im_end|>"


def test_the_mixture_is_valid():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    data = DataSettings.model_validate(yaml.safe_load(text)["data"])
    assert [source.repeat for source in data.train.sources] == [1, 2, 1]
    assert data.eval is not None


def test_media_are_refused_as_the_page_says():
    assert "images" in MEDIA_FIELDS
    assert "images and rows that are tokenized already are refused by name" in " ".join(PAGE.split())
