"""Forms of rows, templates and tokenizers that users bring: read as what they say, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from row_encoding import TOOL, assistant, call, make_encoder, refusal, trained, user
from tiny import tiny_tokenizer

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.errors import DataError, ModelError
from trainer.types import Row


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"instruction": "Translate", "input": "cat", "output": "chat"}, {}),
        ({"instruction": "Translate", "context": "cat", "response": "chat"}, {}),
        (
            {"q": "Translate", "more": "cat", "a": "chat"},
            {"columns": {"instruction": "q", "input": "more", "output": "a"}},
        ),
        ({"conversations": [{"from": "human", "value": "Translate\n\ncat"}, {"from": "gpt", "value": "chat"}]}, {}),
        (
            {"conversations": [{"from": "human", "value": "Translate\n\ncat"}, {"from": "gpt", "value": "chat"}]},
            {"columns": {"messages": "conversations"}},
        ),
        (
            {"turns": [{"who": "user", "text": "Translate\n\ncat"}, {"who": "assistant", "text": "chat"}]},
            {"columns": {"messages": "turns", "role": "who", "content": "text"}},
        ),
    ],
    ids=["alpaca", "dolly", "columns", "sharegpt", "sharegpt-columns", "message-columns"],
)
def test_forms_of_rows_are_read_as_the_same_chat(tmp_path, fields, data):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    source = DataSource(path=str(file))
    encoder = make_encoder(**data)
    (sequence,) = encoder.encode(read_rows(source, encoder.data)).sequences
    plain = make_encoder().encode([Row({"prompt": "Translate\n\ncat", "completion": "chat"})]).sequences[0]
    assert sequence.token_ids == plain.token_ids
    assert sequence.loss_mask == plain.loss_mask


def test_an_input_that_columns_leave_out_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Translate", "input": "cat", "output": "chat"}), encoding="utf-8")
    encoder = make_encoder(columns={"prompt": "instruction", "completion": "output"})
    with pytest.raises(
        DataError, match=r"`input` would not reach the text: the row was read as prompt and .* remove data.columns"
    ):
        encoder.encode(read_rows(DataSource(path=str(file)), encoder.data))


@pytest.mark.parametrize("arguments", ['"hello"', "[1]", "3", ["q"]])
def test_arguments_of_a_call_must_be_an_object(arguments):
    row = {
        "messages": [user("a"), call(arguments), {"role": "tool", "content": "s"}, assistant("GOOD")],
        "tools": [TOOL],
    }
    assert "must be a JSON object" in refusal(make_encoder("qwen3"), row)


# Templates and tokenizers


CLOCK = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"


def test_a_template_that_reads_the_clock_sees_the_date_of_the_recipe():
    def ids(**data: Any) -> tuple[int, ...]:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CLOCK + str(tokenizer.chat_template)
        (sequence,) = (
            make_encoder(tokenizer=tokenizer, **data).encode([Row({"prompt": "a", "completion": "b"})]).sequences
        )
        assert "strftime_now" in tokenizer.chat_template  # served as published
        return sequence.token_ids

    assert "Today is 01 Jan 2026" in tiny_tokenizer().decode(ids())
    assert "Today is 24 Jul 2031" in tiny_tokenizer().decode(ids(template_date="2031-07-24"))


def test_a_clock_that_cannot_be_stopped_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}" + str(tokenizer.chat_template)
    with pytest.raises(ModelError, match=r"reads the clock in a way that cannot be set to data.template_date"):
        make_encoder(tokenizer=tokenizer)


def test_built_in_templates_serve_models_that_have_none(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no chat template. Set `model.chat_template` to .* chatml, llama3"):
        make_encoder(tokenizer=load_tokenizer(ModelSettings(path=str(tmp_path))))
    for name, own in (("chatml", "b<|im_end|>"), ("zephyr", "b<|endoftext|>")):
        model = ModelSettings(path=str(tmp_path), chat_template=name)
        encoder = ChatEncoder(load_tokenizer(model), model, DataSettings(train=DataSource(path="x")))
        assert trained(encoder, {"prompt": "a", "completion": "b"})[0][1] == own
        # What was trained with is what is saved: both the template and the token that ends a turn.
        encoder.tokenizer.save_pretrained(tmp_path / name)
        saved = load_tokenizer(ModelSettings(path=str(tmp_path / name)))
        assert (saved.chat_template, saved.eos_token_id) == (
            encoder.tokenizer.chat_template,
            encoder.tokenizer.eos_token_id,
        )
    with pytest.raises(ModelError, match=r"llama3 ends turns with <\|eot_id\|>, which is no token of this tokenizer"):
        load_tokenizer(ModelSettings(path=str(tmp_path), chat_template="llama3"))


def test_a_token_without_an_embedding_row_is_refused_with_the_row(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<my_new>"])
    encoder = make_encoder(path=str(tmp_path), tokenizer=tokenizer)
    said = refusal(encoder, {"prompt": "a <my_new> b", "completion": "c <my_new>"})
    assert "the token '<my_new>' (id 320) has no row in the model's embedding (320 rows)" in said
    with pytest.raises(DataError, match="'<my_new>'"):
        encoder.encode_prompt(Row({"prompt": "a <my_new>"}))


def test_rft_needs_no_template_that_can_be_trained_with_and_keeps_fields_for_rewards():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'A:' if add_generation_prompt }}"
    with pytest.raises(ModelError):
        make_encoder(tokenizer=tokenizer)
    data = DataSettings(train=DataSource(path="x"))
    encoder = ChatEncoder(tokenizer, ModelSettings(path="nowhere"), data, for_prompts=True)
    row = Row({"prompt": "1+1?", "completion": "2", "history": "x", "input": 3, "loss_mask": [1]})
    assert tokenizer.decode(encoder.encode_prompt(row)) == "1+1?A:"
