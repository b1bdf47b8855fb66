"""What the gateway does with text: stop strings, calls in the text, grammars, batch files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from structured_output import problem_of
from structured_schemas import GUARANTEED, REFUSED
from tiny import tiny_tokenizer

from trainer.config.recipe import DataSource, ModelSettings
from trainer.data.chat import ChatEncoder
from trainer.data.sources import read_rows
from trainer.engine.draw import allowed
from trainer.engine.grammar import Grammars
from trainer.errors import UserError
from trainer.inference.source import ModelSource, plain_data
from trainer.serve.api_errors import ApiError
from trainer.serve.batch import finished, read_batch
from trainer.serve.models import ServedModels
from trainer.serve.readers import CallReader
from trainer.serve.requests import ChatRequest
from trainer.serve.structure import json_grammar, lark, schema_rules
from trainer.serve.text import TextStream
from trainer.serve.tools import tool_rules

ROOT = Path(__file__).parents[2]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def drawn(grammar: str, seed: int, limit: int = 300) -> str | None:
    """A random text of a grammar by a uniform model; None where it is not finished in time."""
    tokenizer = tiny_tokenizer()
    grammars = Grammars(tokenizer, len(tokenizer), [2])
    matcher = grammars.matcher(grammar)
    ids: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while not matcher.is_stopped() and len(ids) < limit:
        flags = allowed(matcher, len(tokenizer)).float()
        token = int(torch.multinomial(flags, 1, generator=generator))
        if token == 2:
            return tokenizer.decode(ids)
        ids.append(token)
        assert matcher.consume_token(token)
    return tokenizer.decode(ids) if matcher.is_stopped() else None


def test_text_stops_before_a_stop_string_that_spans_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the quick brown fox; jumps")["input_ids"]
    stream, text = TextStream(tokenizer, ["wn fo", "never"]), ""
    for token in ids:
        text += stream.feed(token)
        assert "wn f" not in text
        if stream.is_stopped:
            break
    assert text + stream.flush() == "the quick bro"


def test_what_only_begins_like_a_stop_string_is_given_out() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, ["fox!"])
    text = "".join(stream.feed(token) for token in tokenizer("the fox")["input_ids"])
    assert text == "the "
    assert stream.flush() == "fox"


@pytest.mark.parametrize("seed", range(20))
def test_required_calls_have_valid_arguments(seed: int) -> None:
    request = ChatRequest(model="m", messages=[{}], tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    text = drawn(lark(tool_rules(request, [WEATHER], {}), {}), seed)
    assert text is not None
    reader = CallReader()
    parts = [reader.feed(letter) for letter in text]
    content, (call, *rest) = "".join(part for part, _ in parts), [call for _, calls in parts for call in calls]
    assert content.strip() == ""
    assert call["function"]["name"] == "weather"
    arguments = "".join(each["function"]["arguments"] for each in rest)
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def test_automatic_calls_may_stand_behind_text_and_text_alone_is_allowed() -> None:
    request = ChatRequest(model="m", messages=[{}], tools=[WEATHER])
    grammar = lark(tool_rules(request, [WEATHER], {}), {})
    tokenizer = tiny_tokenizer()
    grammars = Grammars(tokenizer, len(tokenizer), [2])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    for text in ("just text", f"I look. {call}", f"{call}\n{call}"):
        matcher = grammars.matcher(grammar)
        assert all(matcher.consume_token(token) for token in tokenizer(text)["input_ids"]), text
        assert matcher.is_accepting(), text
    matcher = grammars.matcher(grammar)
    wrong = tokenizer('<tool_call>\n{"name": "other"')["input_ids"]
    assert not all(matcher.try_consume_tokens([token]) for token in wrong)


def test_a_call_that_is_cut_is_content() -> None:
    reader = CallReader()
    assert reader.feed("so <tool_call>\n{") == ("so ", [])
    assert reader.flush() == "<tool_call>\n{"


@pytest.mark.parametrize("name", REFUSED)
def test_awkward_schemas_that_nobody_can_guarantee_are_refused(name: str) -> None:
    with pytest.raises(ApiError, match=name):
        json_grammar(REFUSED[name])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"not": {}}}}, "the keyword `not` at #/properties/a"),
        ({"type": "array", "uniqueItems": True}, "the keyword `uniqueItems`"),
        ({"if": {}, "then": {}}, "the keyword `if`"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"x-guidance": {"coerce_one_of": True}}, "x-guidance"),
    ],
)
def test_what_cannot_be_guaranteed_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        json_grammar(schema)


@pytest.mark.parametrize("name", GUARANTEED)
def test_finished_texts_of_awkward_schemas_are_valid(name: str) -> None:
    schema = GUARANTEED[name]
    json_grammar(schema)
    texts = [text for seed in range(3) if (text := drawn(lark(schema_rules(schema), {}), seed, 200)) is not None]
    assert texts or name == "large object"
    for text in texts:
        assert problem_of(schema, text) is None


def test_names_of_properties_are_no_keywords() -> None:
    assert json_grammar({"type": "object", "properties": {"not": {"enum": [{"if": 1}]}}})


def test_two_lines_of_a_batch_with_one_id_are_refused_and_a_cut_result_is_forgotten(tmp_path: Path) -> None:
    line = {"custom_id": "a", "url": "/v1/completions", "body": {}}
    file = tmp_path / "in.jsonl"
    file.write_text(f"{json.dumps(line)}\n\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=r"in\.jsonl:3: custom_id 'a' is that of line 1"):
        read_batch(file)
    file.write_text('[]\n{"custom_id": "b", "url": "/v2", "body": {}}\n{"custom_id": 3}\n')
    assert [(each.key, each.line) for each in read_batch(file)] == [("line-1", None), ("b", None), ("line-3", None)]
    results = tmp_path / "out.jsonl"
    results.write_text('{"custom_id": "a"}\n{"custom_id": "b"')
    assert finished(results) == {"a"}
    assert results.read_text() == '{"custom_id": "a"}\n'


@pytest.mark.model
@pytest.mark.skipif(not (ROOT / "models" / "SmolLM2-135M-Instruct").is_dir(), reason="no models/ (scripts/quickstart)")
def test_prompts_of_serving_have_the_ids_of_training_for_every_row_of_the_quickstart() -> None:
    model = ModelSettings(path=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    data = plain_data()
    models = ServedModels(ModelSource("base", model, data), "base")
    encoder = ChatEncoder(models.base.tokenizer, model, data.model_copy(update={"max_seq_tokens": 256}))
    count = 0
    for name in ("extract_train", "extract_heldout"):
        rows = read_rows(DataSource(path=str(ROOT / "datasets" / f"{name}.jsonl")), data)
        for row, sequence in zip(rows, encoder.encode(rows).sequences, strict=True):
            prompt = row["messages"][:-1] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
            ids = models.base.prompt_ids(prompt, None, {})
            assert sequence.token_ids[: len(ids)] == ids
            assert not any(sequence.loss_mask[: len(ids)])
            assert sequence.loss_mask[len(ids)]
            count += 1
    assert count > 500
