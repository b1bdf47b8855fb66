"""The rule of training text, over random chats and the chat templates of many models: it holds, or the row is refused.

For every trained assistant turn the ids before it are those of the model's own template for the messages before it with
the generation prompt, and its own ids are those of its content and one stop token.
"""

from __future__ import annotations

import re
import tempfile
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.chat import ChatEncoder
from trainer.errors import DataError, ModelError
from trainer.types import Row

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CONTROL = re.compile(
    r"<[|\uff5c][^<>{}'\" ]+?[|\uff5c]>|<(?:start|end)_of_turn>|</?s>|<[|]turn>|<turn[|]>|<eos>|<bos>"
    r"|<end_of_utterance>"
)
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<|call|>",
    "<|end|>",
    "<|user|>",
    "<|observation|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_utterance>",
    "<|eot|>",
    "</s>",
)
"""How the families end a turn: the first that a template names is the tokenizer's stop token, all of them stop."""


@cache
def tokenizer_for(file: Path) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with the template and its control tokens."""
    tokenizer = tiny_tokenizer()
    template = file.read_text(encoding="utf-8")
    known = [token for token in ENDS if token in template]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(template)))})
    if known:
        tokenizer.eos_token = known[0]
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = template
    return tokenizer


@cache
def encoder_for(file: Path) -> ChatEncoder | None:
    """None where the template cannot be trained with, which is said in words."""
    tokenizer = tokenizer_for(file)
    directory = Path(tempfile.mkdtemp())
    template = file.read_text(encoding="utf-8")
    ends = [token for token in ENDS if token in template and not (token == "<|end|>" and "<|return|>" in template)]
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ends]
    GenerationConfig(eos_token_id=stops).save_pretrained(directory)
    model, data = ModelSettings(path=str(directory)), DataSettings(train=DataSource(path="x"), max_seq_tokens=100_000)
    try:
        return ChatEncoder(tokenizer, model, data)
    except ModelError as error:
        if len(str(error)) < 20:
            raise
        return None


DATE = date(2026, 1, 1)
CLOCK = re.compile(r"strftime_now\([\"']([^\"']*)[\"']\)")
OF_PARTS = {"smolvlm", "smolvlm_training", "idefics3", "idefics3_training", "llava_next", "llava_next_training"}
"""Templates that take contents as lists of parts."""
TEXTS = st.one_of(
    st.text(alphabet="ab z\n\t.<é猫", min_size=0, max_size=8),
    st.sampled_from(
        [" two words", "\n\nHello", "  x = 1\n", "<think>\nwhy\n</think>\n\nso", "{}", "don't", "a\n", "12"]
    ),
)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Questions and answers, sometimes with a system message, reasoning and weights."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        answer: dict[str, Any] = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.integers(0, 3)) == 0:
            answer["reasoning_content"] = draw(TEXTS)
        if draw(st.integers(0, 5)) == 0:
            answer["weight"] = 0
        messages.append(answer)
    return messages


def parts_of(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def squashed(text: str) -> str:
    return "".join(text.split())


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "one"}}},
        },
    }
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "1+2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "123456789", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "3", "name": "add", "tool_call_id": "123456789"},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_calls_of_tools_follow_the_rule_too(file):
    check(file, CALLS, TOOLS)


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=chats())
def test_every_trained_turn_stands_behind_the_prompt_that_is_served(file, messages):
    check(file, messages, None)


def check(file: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    """The rule holds, or the row is refused by file and line."""
    encoder = encoder_for(file)
    if encoder is None:
        return
    tokenizer = encoder.tokenizer
    try:
        (sequences,) = encoder.encode([Row({"messages": messages, "tools": tools}, file="rows.jsonl", line=7)]).rows
    except DataError as error:
        if not str(error).startswith("rows.jsonl:7: "):
            raise
        return
    trained = [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)
    ]
    runs = [run for sequence in sequences for run in runs_of(sequence.token_ids, sequence.loss_mask)]
    assert len(runs) == len(trained)
    for index, (before, own) in zip(trained, runs, strict=True):
        text = tokenizer.apply_chat_template(
            [parts_of(message) if file.stem in OF_PARTS else message for message in messages[:index]],
            chat_template=CLOCK.sub(lambda clock: repr(DATE.strftime(clock[1])), file.read_text(encoding="utf-8")),
            add_generation_prompt=True,
            tools=tools,
            tokenize=False,
        )
        assert list(before) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert own[-1] in encoder.stop_ids
        assert not encoder.stop_ids & set(own[:-1])
        opening = "<think>" if text.rstrip().endswith("<think>") else ""  # DeepSeek's prompt holds it already
        said = opening + squashed(tokenizer.decode(own))
        assert squashed(messages[index]["content"]) in said
        assert squashed(messages[index].get("reasoning_content", "")) in said


def runs_of(ids, trained):
    """What comes before each run of trained tokens, and the run."""
    runs, start = [], None
    for position, is_trained in enumerate([*trained, False]):
        if is_trained and start is None:
            start = position
        elif not is_trained and start is not None:
            runs.append((ids[:start], ids[start:position]))
            start = None
    return runs


def test_most_templates_can_be_trained_with():
    accepted = {
        file.stem for file in TEMPLATES if not file.stem.endswith("_training") and encoder_for(file) is not None
    }
    assert len(accepted) >= 30, sorted(accepted)
    assert {"qwen3", "llama3_1", "llama3_2", "glm4moe", "gptoss", "phi3", "gemma4", "smolvlm"} <= accepted
