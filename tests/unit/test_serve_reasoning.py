"""Reasoning and calls separated from content, with the chat templates of popular models."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model_dir
from transformers import AutoTokenizer

from trainer.config.recipe import ModelSettings
from trainer.engine.draw import allowed
from trainer.engine.grammar import Grammars
from trainer.inference.source import ModelSource, plain_data
from trainer.serve.api_errors import ApiError
from trainer.serve.models import Served, ServedModels
from trainer.serve.readers import AnswerReader, CallReader, Delta, ReasoningReader
from trainer.serve.reasoning import FORMS, Reasoning, Stage, reasoning_of, template_arguments
from trainer.serve.requests import ChatRequest
from trainer.serve.structure import lark, schema_rules
from trainer.serve.text import TextStream, special_ids
from trainer.serve.tools import tool_rules, tools_of, writes_json_calls

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"  # type: ignore[arg-type]
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CHAT: list[Any] = [{"role": "user", "content": "why is the sky blue?"}]
THINK = FORMS[0]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome", "</tool_call>"]},
                "note": {"type": "string", "maxLength": 9},
            },
            "required": ["city", "note"],
            "additionalProperties": False,
        },
    },
}
Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """A tiny model with the template of a known one; its tags are single tokens, as those models have them."""
    directory = tiny_model_dir(tmp_path_factory.mktemp("reasoning") / "model")
    found: dict[tuple[str, bool], Served] = {}

    def served(name: str, *, special: bool = False) -> Served:
        if (name, special) not in found:
            tokenizer = AutoTokenizer.from_pretrained(directory)
            tokenizer.add_tokens(list(TAGS), special_tokens=special)
            tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
            path = directory.parent / f"{name}-{special}"
            tiny_model_dir(path, vocab_size=len(tokenizer))
            tokenizer.save_pretrained(path)
            settings = ModelSettings(path=str(path), compute_dtype="float32")
            found[name, special] = ServedModels(ModelSource(name, settings, plain_data()), name).base
        return found[name, special]

    return served


def request_of(**how: Any) -> ChatRequest:
    return ChatRequest(**{"model": "m", "messages": CHAT, **how})


def prompt_of(served: Served, **how: Any) -> tuple[int, ...]:
    request = request_of(**how)
    return served.prompt_ids(request.messages, request.tools, template_arguments(request, served))


@pytest.mark.parametrize(
    ("name", "effort", "stage"),
    [
        ("qwen3", None, Stage.MAY_OPEN),
        ("qwen3", "high", Stage.MAY_OPEN),
        ("qwen3", "none", Stage.IS_CLOSED),
        ("qwen3_5_think", None, Stage.IS_OPEN),
        ("qwen3_5_think", "none", Stage.IS_CLOSED),
        ("qwen3_5_nothink", None, Stage.IS_CLOSED),
        ("qwen3_5_nothink", "low", Stage.IS_OPEN),
        ("qwen3_6", "none", Stage.IS_CLOSED),
        ("qwen3_8", "low", Stage.IS_OPEN),
        ("qwen3_8", "none", Stage.IS_CLOSED),
        ("glm4moe", "high", Stage.MAY_OPEN),
        ("glm4moe", "none", Stage.IS_CLOSED),
        ("nemotron_3_nano", "medium", Stage.IS_OPEN),
        ("nemotron_3_nano", "none", Stage.IS_CLOSED),
        ("deepseek_r1_distill", None, Stage.IS_OPEN),
    ],
)
def test_an_effort_is_the_switch_of_the_template(serve: Serve, name: str, effort: str | None, stage: Stage) -> None:
    served = serve(name)
    found = reasoning_of(served, prompt_of(served, reasoning_effort=effort))
    assert found is not None
    assert (found.form, found.stage) == (THINK, stage)


def test_an_effort_of_degrees_reaches_the_template(serve: Serve) -> None:
    served = serve("qwen3_8")
    low, full = (served.tokenizer.decode(prompt_of(served, reasoning_effort=each)) for each in ("low", "xhigh"))
    assert "Reasoning effort is set to low." in low
    assert "Reasoning effort is set to xhigh." in full


@pytest.mark.parametrize(
    ("name", "effort", "message"),
    [
        ("deepseek_r1_distill", "none", "no switch for reasoning"),
        ("deepseek_r1_distill", "high", "no switch for reasoning"),
        ("qwen2_5", "low", "no switch for reasoning"),
        ("qwen2_5", "none", "no switch for reasoning"),
        ("gptoss", "none", "cannot turn reasoning off"),
        ("gptoss", "xhigh", "does not know 'xhigh'"),
        ("qwen3_8", "minimal", "does not know 'minimal'"),
        ("qwen3_8", "high", "Unexpected reasoning effort high"),
    ],
)
def test_an_effort_that_the_template_has_not_is_refused(serve: Serve, name: str, effort: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as found:
        prompt_of(serve(name), reasoning_effort=effort)
    assert found.value.status == 400


def read(served: Served, reasoning: Reasoning, ids: list[int], *, has_calls: bool = False) -> Delta:
    """An answer as a stream would say it, joined."""
    stream = TextStream(served.tokenizer, [], shown_ids=special_ids(served.tokenizer, TAGS))
    reader, whole = AnswerReader(reasoning, has_calls=has_calls), Delta()
    for last, part in [*((False, stream.feed(token)) for token in ids), (True, stream.flush())]:
        delta = reader.feed(part, 1, is_last=last)
        whole.reasoning += delta.reasoning
        whole.content += delta.content
        whole.calls += delta.calls
    return whole


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe", "nemotron_3_nano"])
def test_what_a_template_writes_is_read_as_reasoning_and_content(serve: Serve, name: str, special: bool) -> None:
    served = serve(name, special=special)
    template = served.encoder.template
    answer = {"role": "assistant", "reasoning_content": "Light\n\nscatters.", "content": "Short waves < long ones."}
    prompt, whole = (
        template.prompt(CHAT, None, {"enable_thinking": True}),
        template.chat([*CHAT, answer], None, {"enable_thinking": True}),
    )
    text = whole.text.removeprefix(prompt)
    assert len(text) < len(whole.text)
    ids = served.tokenizer(text, add_special_tokens=False)["input_ids"]
    reasoning = reasoning_of(served, prompt_of(served, reasoning_effort="high" if name != "qwen3_8" else "low"))
    assert reasoning is not None
    delta = read(served, reasoning, ids)
    assert delta.reasoning == "Light\n\nscatters."
    assert delta.content.strip() == "Short waves < long ones."
    assert not delta.content.startswith("\n")


def test_history_with_reasoning_is_rendered_or_refused(serve: Serve) -> None:
    turns = [
        {"role": "assistant", "content": "Because.", "reasoning_content": "Hm."},
        {"role": "user", "content": "so?"},
    ]
    served = serve("qwen3")
    assert prompt_of(served, messages=[*CHAT, *turns]) == prompt_of(
        served, messages=[*CHAT, {"role": "assistant", "content": "Because."}, turns[1]]
    )


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", "<", "</thi", "nk>", " "]), max_size=12).map(
    "".join
)


@given(TEXTS, st.sampled_from([Stage.MAY_OPEN, Stage.IS_OPEN]), st.integers(1, 5))
def test_the_pieces_of_a_text_do_not_matter(text: str, stage: Stage, size: int) -> None:
    def parts(pieces: list[str]) -> tuple[str, str]:
        reader = ReasoningReader(Reasoning(THINK, stage))
        found = [*(reader.feed(piece) for piece in pieces), reader.flush()]
        return "".join(a for a, _ in found), "".join(b for _, b in found)

    whole = parts([text])
    assert parts([text[at : at + size] for at in range(0, len(text), size)]) == whole
    assert THINK.close not in whole[0]


def test_an_answer_that_is_cut_within_reasoning_has_no_content() -> None:
    reader = ReasoningReader(Reasoning(THINK, Stage.IS_OPEN))
    assert [*reader.feed("so it </thi"), *reader.flush()] == ["so it ", "", "</thi", ""]


def calls_of(deltas: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and arguments of each call, from the deltas of a stream."""
    found: dict[int, list[str]] = {}
    for delta in deltas:
        call = found.setdefault(delta["index"], ["", ""])
        call[0] += delta["function"].get("name", "")
        call[1] += delta["function"]["arguments"]
    return [(name, arguments) for name, arguments in found.values()]


def test_a_name_comes_first_and_arguments_as_they_grow() -> None:
    reader = CallReader()
    text = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "}</tool_call>", "n": [{}]}}\n</tool_call>'
    parts = [reader.feed(letter) for letter in text]
    assert "".join(content for content, _ in parts) + reader.flush() == "I look.\n"
    deltas = [delta for _, some in parts for delta in some]
    assert (deltas[0]["function"], deltas[0]["type"]) == ({"name": "weather", "arguments": ""}, "function")
    assert all(set(delta) == {"index", "function"} and delta["function"]["arguments"] for delta in deltas[1:])
    assert len(deltas) > 20
    assert calls_of(deltas) == [("weather", '{"city": "}</tool_call>", "n": [{}]}')]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_of_a_random_model_have_valid_arguments_behind_reasoning(serve: Serve, seed: int, choice: str) -> None:
    served = serve("qwen3", special=seed % 2 == 1)
    request = request_of(tools=[WEATHER], tool_choice=choice)
    reasoning = reasoning_of(served, prompt_of(served))
    assert reasoning is not None
    added = served.tokenizer.get_added_vocab()
    ids = drawn(served, lark(tool_rules(request, tools_of(request, served), added), added, reasoning), seed)
    delta = read(served, reasoning, ids, has_calls=True)
    calls = calls_of(delta.calls)
    if choice == "required":
        assert calls
        assert delta.content.strip() == ""
    for name, arguments in calls:
        assert name == "weather"
        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


@pytest.mark.parametrize("special", [False, True])
def test_structured_output_follows_reasoning(serve: Serve, special: bool) -> None:
    served = serve("qwen3_5_think", special=special)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    reasoning = reasoning_of(served, prompt_of(served))
    assert reasoning is not None
    grammar = lark(schema_rules(schema), served.tokenizer.get_added_vocab(), reasoning)
    delta = read(served, reasoning, drawn(served, grammar, 0))
    assert delta.reasoning
    jsonschema.validate(json.loads(delta.content), schema)


def drawn(served: Served, grammar: str, seed: int) -> list[int]:
    """A random text of a grammar by a model that soon ends what it began."""
    grammars = Grammars(served.tokenizer, len(served.tokenizer), [2])
    matcher = grammars.matcher(grammar)
    tags = [2, *served.tokenizer.convert_tokens_to_ids(list(TAGS))]
    ids: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while not matcher.is_stopped() and len(ids) < 3000:
        weights = allowed(matcher, len(served.tokenizer)).float()
        weights[tags] *= 30
        token = int(torch.multinomial(weights, 1, generator=generator))
        if token == 2:
            break
        ids.append(token)
        assert matcher.consume_token(token), matcher.get_error()
    assert matcher.is_accepting()
    return ids


@pytest.mark.parametrize(
    ("name", "is_read"),
    [("qwen3", True), ("qwen2_5", True), ("qwen3_5_think", False), ("glm4moe", False), ("llama3_1", False)],
)
def test_calls_are_read_only_in_the_form_that_the_template_writes(serve: Serve, name: str, is_read: bool) -> None:
    served = serve(name)
    assert writes_json_calls(served.encoder.template) == is_read
    if not is_read:
        with pytest.raises(ApiError, match="does not write calls as <tool_call>"):
            tools_of(request_of(tools=[WEATHER]), served)


@pytest.mark.parametrize(
    ("tool", "choice", "message"),
    [
        ({"type": "function", "function": {"name": "a b"}}, "auto", r"tools\[0\]\.function\.name must have"),
        ({"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}, "auto", "type object"),
        ({"type": "function", "function": {"name": "a", "parameters": [1]}}, "auto", "must be a JSON Schema"),
        ({"type": "custom", "custom": {"name": "a"}}, "auto", "must be of type function"),
        (WEATHER, {"type": "allowed_tools", "allowed_tools": {}}, "must be none, auto, required or one function"),
        (WEATHER, {"type": "function", "function": {"name": "other"}}, "which is none of the tools"),
    ],
)
def test_tools_that_cannot_be_called_are_refused(serve: Serve, tool: Any, choice: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        tools_of(request_of(tools=[tool], tool_choice=choice), serve("qwen3"))
