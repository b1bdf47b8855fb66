"""Tools, reasoning and structured output of a thinking model, by OpenAI's own client; what the server refuses."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import openai
import psutil
import pytest
from project import Project
from pydantic import BaseModel
from serving import Server, serving
from tiny import tiny_model_dir
from transformers import AutoTokenizer

TEMPLATES: Final = Path(find_spec("trl").origin).parent / "chat_templates"  # type: ignore[arg-type]
MODEL: Final = "thinker"
TAGS: Final = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CHAT: Final[list[Any]] = [{"role": "user", "content": "what is the sum of 8 and 90?"}]


class Weather(BaseModel):
    """Of a city."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]


class Sum(BaseModel):
    """Of two numbers."""

    a: Literal[1, 2]


TOOLS: Final[Any] = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Sum)]


def thinker(path: Path) -> None:
    """A tiny model with Qwen3's template, whose tags are tokens of their own as in Qwen3's vocabulary."""
    tiny_model_dir(path, vocab_size=324, max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(TAGS)
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module")
def server(shared: Project) -> Iterator[Server]:
    thinker(shared.root / MODEL)
    with serving(shared, MODEL) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Any:
    return server.client()


def ask(client: Any, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": CHAT, "temperature": 1, "seed": 1, "max_tokens": 300, **how}
    )


def test_reasoning_is_no_content_and_none_turns_it_off(client: Any) -> None:
    how: dict[str, Any] = {"logit_bias": {"320": 100}, "max_tokens": 6}  # nothing but <think>
    thinking = ask(client, reasoning_effort="high", **how)
    message = thinking.choices[0].message
    assert (message.content, message.reasoning_content) == ("", "<think>" * 5)
    assert thinking.usage.completion_tokens_details.reasoning_tokens == 6
    direct = ask(client, reasoning_effort="none", **how)
    assert direct.choices[0].message.content == "<think>" * 6
    assert direct.usage.prompt_tokens > thinking.usage.prompt_tokens  # an empty <think></think>
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True, **how)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "<think>" * 5
    assert not any(delta.content for delta in deltas)


def streamed_calls(chunks: Any) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call of a stream."""
    calls: list[list[str]] = []
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or []:
            if delta.id:
                assert delta.function.name
                assert delta.index == len(calls)
                calls.append([delta.id, delta.function.name, ""])
            calls[delta.index][2] += delta.function.arguments or ""
    return [(number, name, arguments) for number, name, arguments in calls]


def test_calls_stream_by_name_and_pieces_of_arguments(client: Any) -> None:
    how: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "reasoning_effort": "none"}
    chunks = list(ask(client, stream=True, parallel_tool_calls=False, **how))
    ((_, name, arguments),) = streamed_calls(chunks)
    (Weather if name == "Weather" else Sum).model_validate_json(arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 3
    whole = ask(client, parallel_tool_calls=False, **how).choices[0]
    assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == [(name, arguments)]
    assert whole.message.content is None


def test_several_calls_of_one_answer(client: Any) -> None:
    how: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "reasoning_effort": "none", "max_tokens": 700}
    answers = ask(client, n=4, **how).choices
    calls = [choice.message.tool_calls for choice in answers]
    assert any(len(some) > 1 for some in calls)
    for choice in answers:
        whole = choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]
        for call in whole:
            (Weather if call.function.name == "Weather" else Sum).model_validate_json(call.function.arguments)


def test_a_named_tool_is_called_and_none_calls_nothing(client: Any) -> None:
    named = {"type": "function", "function": {"name": "Sum"}}
    parsed = client.chat.completions.parse(
        model=MODEL, messages=CHAT, tools=TOOLS, tool_choice=named, parallel_tool_calls=False,
        reasoning_effort="none", seed=2, max_tokens=300,
    )  # fmt: skip
    (call,) = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sum)
    result = [
        *CHAT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    bias = {"322": 100}
    answer = ask(client, messages=result, tools=TOOLS, tool_choice="none", max_tokens=4, logit_bias=bias)
    assert (answer.choices[0].message.tool_calls, answer.choices[0].message.content) == (None, "<tool_call>" * 4)


def test_automatic_calls_begin_with_the_tag_of_the_vocabulary(client: Any) -> None:
    how: dict[str, Any] = {"tools": TOOLS, "tool_choice": "auto", "reasoning_effort": "none"}
    answer = ask(client, logit_bias={"322": 100}, **how).choices[0]  # the token <tool_call>, which text never has
    assert answer.message.tool_calls
    answer = ask(client, logit_bias={"322": -100}, max_tokens=30, **how).choices[0]
    assert answer.message.tool_calls is None


def test_an_answer_of_a_schema_may_follow_reasoning(client: Any) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=CHAT, response_format=Sum, max_tokens=600, seed=3, logit_bias={"320": 100, "321": 100}
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    assert parsed.usage.completion_tokens_details.reasoning_tokens == 2  # <think></think>


def test_the_asynchronous_client_and_its_stream_helper(server: Server) -> None:
    async def run() -> tuple[Any, Any]:
        async with server.async_client() as client:
            how: dict[str, Any] = {"model": MODEL, "messages": CHAT, "seed": 4, "max_tokens": 300}
            async with client.chat.completions.stream(
                **how, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, reasoning_effort="none"
            ) as stream:
                kinds = {event.type async for event in stream}
                return kinds, await stream.get_final_completion()

    kinds, final = asyncio.run(run())
    assert "tool_calls.function.arguments.delta" in kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Weather | Sum)


def test_a_completion_may_repeat_its_prompt_with_log_probabilities(client: Any) -> None:
    how: dict[str, Any] = {"model": MODEL, "temperature": 0, "logprobs": 1, "echo": True}
    plain = client.completions.create(model=MODEL, prompt="the quick", max_tokens=3, temperature=0).choices[0]
    one, two = client.completions.create(prompt=["the quick", "the sum of 8"], max_tokens=3, **how).choices
    assert one.text == "the quick" + plain.text
    assert two.text.startswith("the sum of 8")
    count = len(one.logprobs.token_logprobs) - 3
    assert count >= 2
    assert one.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in one.logprobs.token_logprobs[1:])
    assert "".join(one.logprobs.tokens[:count]) == "the quick"
    assert one.logprobs.text_offset[:2] == [0, len(one.logprobs.tokens[0])]
    (scored,) = client.completions.create(prompt="the quick", max_tokens=0, **how).choices
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(one.logprobs.token_logprobs[1:count], abs=1e-4)


def leave(server: Server, number: int) -> None:
    """A client that resets its connection behind some bytes of the answer, or within its own request."""
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 200, "ignore_eos": True, "stream": number % 3 > 0}
    content = json.dumps(body | {"n": 1 + number % 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    message = head.encode() + b"Content-Type: application/json\r\n\r\n" + content
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(message[: len(message) // 2] if number % 7 == 0 else message)
        if number % 3 and number % 7:
            client.recv(1 + number * 37 % 900)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_that_reset_leave_no_sequence_page_or_socket_behind(server: Server) -> None:
    gateway = psutil.Process(server.running.process.pid)
    leave(server, 1)
    server.wait_idle()
    before = gateway.num_fds()
    for number in range(30):
        leave(server, number)
    stats = server.wait_idle()
    assert {stats[name] for name in ("live", "running", "waiting", "pages_used")} == {0}
    assert gateway.num_fds() <= before + 1
    gc_words = ("never retrieved", "Traceback", "already running")
    assert not [word for word in gc_words if word in server.running.err.read_text()]


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        ("chat/completions", b"no json", None),
        ("chat/completions", b"[]", None),
        ("chat/completions", b"\xff\xfe", None),
        ("chat/completions", b"[" * 100_000, None),
        ("chat/completions", json.dumps({"model": MODEL, "messages": CHAT, "n": 10**9}).encode(), "n"),
        ("chat/completions", json.dumps({"model": MODEL, "messages": CHAT, "stop": [1]}).encode(), "stop"),
        ("completions", json.dumps({"model": MODEL, "prompt": [10**30]}).encode(), "prompt"),
        ("load_lora_adapter", b"{}", "lora_name"),
        ("batches", b"{}", "input_file_id"),
        ("files", b"{}", "file"),
    ],
)
def test_a_malformed_body_is_a_400_of_the_api(server: Server, path: str, content: bytes, param: str | None) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/{path}", content=content, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert answer.headers["x-request-id"]
