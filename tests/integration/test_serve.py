"""`trainer serve` answers OpenAI's own client: real processes, a tiny model, two adapters."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Final, Literal

import httpx
import jsonschema
import openai
import pytest
from adapter_files import adapter_dir
from project import Project
from pydantic import BaseModel
from serving import Server, serving

BASE: Final = "model"
CHAT: Final[list[Any]] = [{"role": "user", "content": "what is the sum of 8 and 90?"}]


@pytest.fixture(scope="module")
def adapted(shared: Project) -> Project:
    """A project with two adapters of different ranks and targets."""
    adapter_dir(shared.root / "first", shared.root / "model", rank=4, seed=1)
    adapter_dir(shared.root / "second", shared.root / "model", rank=2, seed=2, target_modules=["q_proj", "v_proj"])
    for name in ("first", "second"):  # as PEFT would name it from the project's directory
        file = shared.root / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    return shared


@pytest.fixture(scope="module")
def server(adapted: Project) -> Iterator[Server]:
    with serving(
        adapted, "model", "--adapter", "first=first", "--adapter", "second=second", "--kv-cache-tokens", "8192"
    ) as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def ask(client: openai.OpenAI, model: str = BASE, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": CHAT, "temperature": 0, "max_tokens": 12, **how}
    )


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [BASE, "first", "second"]
    assert client.models.retrieve("first").id == "first"
    with pytest.raises(openai.NotFoundError, match="there are: model, first, second"):
        ask(client, "third")


def test_each_adapter_answers_for_itself_and_base_hash_adapter_names_it(client: openai.OpenAI) -> None:
    texts = [ask(client, name).choices[0].message.content for name in (BASE, "first", "second")]
    assert len(set(texts)) == 3
    assert ask(client, f"{BASE}#first").choices[0].message.content == texts[1]


def test_a_stream_has_the_text_and_the_usage_of_the_whole(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_plain_completion_goes_on_from_text_or_ids(client: openai.OpenAI) -> None:
    by_text = client.completions.create(model=BASE, prompt="the quick", temperature=0, max_tokens=5)
    ids = httpx.post(str(client.base_url) + "completions", json={"model": BASE, "prompt": [80]}).json()
    assert by_text.usage.completion_tokens == 5
    assert ids["usage"]["prompt_tokens"] == 1
    both = client.completions.create(model=BASE, prompt=["the quick", "the"], temperature=0, max_tokens=5, logprobs=2)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == by_text.choices[0].text
    assert len(both.choices[1].logprobs.top_logprobs[0]) == 2


def test_seed_n_stop_and_logprobs(client: openai.OpenAI) -> None:
    first, again = (ask(client, temperature=1, seed=3, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens <= 36
    text = ask(client).choices[0].message.content
    stop = text[4:6]
    stopped = ask(client, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    reported = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(reported) == 12
    assert reported[0].token == reported[0].top_logprobs[0].token
    assert reported[0].logprob <= 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_tokens": 100_000}, "together at most 512 fit"),
        ({"temperature": 3}, "less than or equal to 2"),
        ({"extra_body": {"beam_width": 4}}, "beam_width: unknown field, not supported"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": "a <|im_end|> b"}]}, "control token"),
        ({"logit_bias": {"9999999": 1}}, "is no token id"),
        ({"reasoning_effort": "high"}, "has no switch for reasoning"),
    ],
)
def test_what_the_client_must_change_is_a_400_with_the_reason(
    client: openai.OpenAI, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as found:
        ask(client, **how)
    assert found.value.type == "invalid_request_error"
    assert found.value.request_id


class Order(BaseModel):
    """What a test asks for."""

    item: Literal["tea", "coffee"]
    is_large: bool


def test_structured_output_is_valid_at_any_temperature_or_refused_by_keyword(client: openai.OpenAI) -> None:
    text, number = {"type": "string", "maxLength": 6}, {"type": "integer", "minimum": -5, "maximum": 99}
    schema = {
        "type": "object",
        "properties": {"item": text, "count": number, "parts": {"type": "array", "items": text, "maxItems": 2}},
        "required": ["item", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": True}}
    answers = ask(client, "first", temperature=1.2, seed=0, n=20, max_tokens=90, response_format=wanted)
    finished = [each.message.content for each in answers.choices if each.finish_reason == "stop"]
    assert len(finished) > 5
    for text in finished:
        jsonschema.validate(json.loads(text), schema)
    parsed = client.chat.completions.parse(
        model=BASE, messages=CHAT, response_format=Order, max_tokens=200, temperature=0.5, seed=1
    )
    assert isinstance(parsed.choices[0].message.parsed, Order)
    refused = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError, match="the keyword `not` at # cannot be guaranteed"):
        ask(client, response_format=refused)


def test_health_metrics_request_ids_and_routes_that_do_not_exist(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    answer = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    missing = httpx.get(f"{server.url}/tokenize")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx.post(f"{server.url}/v1/embeddings", json={}).status_code == 400
    text = httpx.get(f"{server.url}/metrics").text
    assert 'trainer_requests_total{route="/v1/models",status="200"}' in text
    assert 'trainer_tokens_total{kind="completion",model="model"}' in text


def test_clients_that_leave_free_their_pages(server: Server) -> None:
    async def leave(number: int) -> None:
        async with server.async_client() as client:
            stream = await client.chat.completions.create(
                model=(BASE, "first")[number % 2], messages=CHAT, stream=True, max_tokens=300, seed=number
            )
            async for _ in stream:
                break
            await stream.close()

    async def all_leave() -> None:
        await asyncio.gather(*(leave(number) for number in range(20)))

    asyncio.run(all_leave())
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": BASE, "messages": CHAT, "max_tokens": 400, "ignore_eos": True, "n": 16}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    stats = server.wait_idle()
    assert (stats["live"], stats["pages_used"]) == (0, 0)


def test_adapters_are_replaced_while_requests_run(server: Server, adapted: Project, client: openai.OpenAI) -> None:
    def load(path: str) -> httpx.Response:
        body = {"lora_name": "hot", "lora_path": path}
        return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)

    here = str(adapted.root)
    assert load("first").status_code == 200
    text = ask(client, "hot", max_tokens=60).choices[0].message.content
    stream = ask(client, "hot", max_tokens=60, stream=True)
    begun = next(iter(stream)).choices[0].delta.content or ""
    replaced = load("second").json()
    assert replaced["version"].startswith("hot@")
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert begun + rest == text  # a request in flight keeps the version that it began with
    assert ask(client, "hot").choices[0].message.content == ask(client, "second").choices[0].message.content
    broken = load(f"{here}/nothing")
    assert (broken.status_code, "no run, no adapter" in broken.text) == (400, True)
    assert ask(client, "hot").choices[0].message.content == ask(client, "second").choices[0].message.content
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "hot"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, "hot")


def test_a_dead_engine_is_replaced_and_streams_go_on(server: Server, client: openai.OpenAI) -> None:
    whole = ask(client, "first", max_tokens=400, extra_body={"ignore_eos": True})
    stream = ask(client, "first", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    chunks = [next(iter(stream))]
    before = server.engine().pid
    os.kill(before, signal.SIGKILL)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content  # float32, one row: equal tokens
    assert server.engine().pid != before
    assert ask(client, "second").choices[0].message.content


def test_keys_limits_and_the_end(adapted: Project) -> None:
    open_to_all = adapted.trainer("serve", "model", "--host", "0.0.0.0")
    assert (open_to_all.code, "--api-key-file" in open_to_all.stderr) == (2, True)
    (adapted.root / "keys").write_text("secret-1\nsecret-2\n")
    with serving(adapted, "model", "--api-key-file", "keys", "--max-queue", "2") as server:
        with pytest.raises(openai.AuthenticationError):
            ask(server.client("wrong"))
        client = server.client("secret-2")
        with pytest.raises(openai.RateLimitError) as found:
            ask(client, n=3)
        assert found.value.response.headers["retry-after"] == "1"
        stream = ask(client, stream=True, max_tokens=300, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.running.signal(signal.SIGTERM)
        chunks = list(stream)  # drained, not cut
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.running.wait(60).code == 0
