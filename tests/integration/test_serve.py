"""`trainer serve` answers OpenAI's own client: real processes, a tiny model, two adapters."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import jsonschema
import openai
import psutil
import pytest
from adapter_files import adapter_dir
from project import BIN, PATIENCE_S, Project
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
def client(server: Server) -> Any:
    return server.client()


def ask(client: Any, model: str = BASE, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": CHAT, "temperature": 0, "max_tokens": 12, **how}
    )


def test_models_are_the_base_and_its_adapters(client: Any) -> None:
    assert [each.id for each in client.models.list()] == [BASE, "first", "second"]
    assert client.models.retrieve("first").id == "first"
    with pytest.raises(openai.NotFoundError, match="there are: model, first, second"):
        ask(client, "third")


def test_each_adapter_answers_for_itself_and_base_hash_adapter_names_it(client: Any) -> None:
    texts = [ask(client, name).choices[0].message.content for name in (BASE, "first", "second")]
    assert len(set(texts)) == 3
    assert ask(client, f"{BASE}#first").choices[0].message.content == texts[1]


def test_a_stream_has_the_text_and_the_usage_of_the_whole(client: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_plain_completion_goes_on_from_text_or_ids(client: Any) -> None:
    by_text = client.completions.create(model=BASE, prompt="the quick", temperature=0, max_tokens=5)
    ids = httpx.post(str(client.base_url) + "completions", json={"model": BASE, "prompt": [80]}).json()
    assert by_text.usage.completion_tokens == 5
    assert ids["usage"]["prompt_tokens"] == 1
    both = client.completions.create(model=BASE, prompt=["the quick", "the"], temperature=0, max_tokens=5, logprobs=2)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == by_text.choices[0].text
    assert len(both.choices[1].logprobs.top_logprobs[0]) == 2


def test_seed_n_stop_and_logprobs(client: Any) -> None:
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
def test_what_the_client_must_change_is_a_400_with_the_reason(client: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as found:
        ask(client, **how)
    assert found.value.type == "invalid_request_error"
    assert found.value.request_id


class Order(BaseModel):
    """What a test asks for."""

    item: Literal["tea", "coffee"]
    is_large: bool


def test_structured_output_is_valid_at_any_temperature_or_refused_by_keyword(client: Any) -> None:
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


def test_the_commands_of_the_documentation_work(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "bash", "bash"]
    for kind, text in blocks:
        here = text.replace("http://127.0.0.1:8000", server.url).replace("sft_quickstart", "first")
        program = [sys.executable, "-c"] if kind == "python" else ["bash", "-ec"]
        done = subprocess.run([*program, here], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert "error" not in done.stdout


def test_chat_talks_to_a_server(server: Server, adapted: Project, client: Any) -> None:
    words = [str(BIN / "trainer"), "chat", f"{server.url}/v1#first", "--against", f"{server.url}/v1#second"]
    said = subprocess.run(
        [*words, "--max-tokens", "12"], input=CHAT[0]["content"] + "\n", capture_output=True, text=True, check=True
    ).stdout
    first = ask(client, "first").choices[0].message.content
    assert said.splitlines()[0].split() == ["first", "second"]
    letters = [letter for letter in first.splitlines()[0] if letter.isascii() and letter.isalnum()]
    assert "".join(letters[:6]) in "".join(letter for letter in said if letter.isascii() and letter.isalnum())
    lost = subprocess.run([*words[:2], "http://127.0.0.1:9/v1"], capture_output=True, text=True, check=False)
    assert (lost.returncode, "does not answer" in lost.stderr) == (2, True)


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
    body = {"model": BASE, "messages": CHAT, "max_tokens": 400, "ignore_eos": True, "n": 16}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    stats = server.wait_idle()
    assert (stats["live"], stats["pages_used"]) == (0, 0)


def test_adapters_are_replaced_while_requests_run(server: Server, adapted: Project, client: Any) -> None:
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


def test_files_and_batches(client: Any) -> None:
    lines = [
        {
            "custom_id": f"r{k}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": BASE, "messages": CHAT, "max_tokens": 3 + k, "temperature": 0},
        }
        for k in range(5)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines) + "no json\n"
    file = client.files.create(file=("in.jsonl", data.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch.id)).status == "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (5, 1)
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    tokens = {each["custom_id"]: each["response"]["body"]["usage"]["completion_tokens"] for each in results}
    assert tokens == {f"r{k}": 3 + k for k in range(5)}
    assert "line 6: no JSON" in client.files.content(batch.error_file_id).text
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch-../../secret")


def test_a_batch_that_is_killed_goes_on_and_answers_each_request_once(adapted: Project) -> None:
    lines: list[dict[str, Any]] = [
        {
            "custom_id": f"r{k}",
            "url": "/v1/completions",
            "body": {"prompt": f"the quick {k}", "max_tokens": 200, "ignore_eos": True, "temperature": 1, "seed": k},
        }
        for k in range(300)
    ]
    file = adapted.root / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("batch", "create", "in.jsonl", "--model", "model", "--adapter", "first=first")
    running = adapted.start_trainer(*words)
    out = adapted.root / "in.out.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not (out.exists() and out.read_bytes().count(b"\n") > 20):
        assert running.process.poll() is None, running.wait().said
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.signal(signal.SIGKILL, group=True)
    running.process.wait()
    before = out.read_bytes()
    assert before.count(b"\n") < 300
    out.write_bytes(before + b'{"id": "batch_req_1", "cust')  # as if cut in the middle of a line
    done = adapted.trainer(*words)
    assert done.code == 0, done.said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(each["custom_id"] for each in found) == sorted(line["custom_id"] for line in lines)
    assert found[0]["response"]["body"]["model"] == "first"
    assert out.read_bytes().startswith(before)


def test_a_dead_engine_is_replaced_and_streams_go_on(server: Server, client: Any) -> None:
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


TOOL: Final[Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def test_tools_need_a_template_that_writes_calls(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="does not write calls as <tool_call>"):
        ask(client, tools=[TOOL])


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


def test_a_server_that_is_still_starting_ends_at_sigterm(shared: Project) -> None:
    running = shared.start_trainer("serve", "model", "--port", "0")
    gateway = psutil.Process(running.process.pid)
    deadline = time.monotonic() + PATIENCE_S

    def engines() -> list[psutil.Process]:
        return [child for child in gateway.children() if "trainer.engine" in child.cmdline()]

    def catches_sigterm() -> bool:
        mask = re.search(r"^SigCgt:\t([0-9a-f]+)$", Path(f"/proc/{gateway.pid}/status").read_text(), re.MULTILINE)
        assert mask is not None
        return bool(int(mask.group(1), 16) >> (signal.SIGTERM - 1) & 1)

    while not engines():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (engine,) = engines()
    engine.suspend()  # it is not ready before the signal
    while not catches_sigterm():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.signal(signal.SIGTERM)
    time.sleep(0.2)
    engine.resume()
    done = running.wait()
    assert done.code == 1, done.said
    assert "stopped before it was ready" in done.stderr
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


@pytest.mark.heavy
def test_a_draft_model_changes_no_answer(shared: Project) -> None:
    refused = shared.trainer("serve", "model", "--draft-model", "model", "--speculation", "off")
    assert (refused.code, "--draft-model proposes tokens" in refused.stderr) == (2, True)
    answers = []
    for options in ((), ("--draft-model", "model")):
        with serving(shared, "model", *options, "--kv-cache-tokens", "4096") as server, server.client() as client:
            found = [ask(client, temperature=1, seed=seed, max_tokens=30, extra_body={"ignore_eos": True})
                     for seed in range(3)]  # fmt: skip
            answers.append([each.choices[0].message.content for each in found])
            stats = server.stats()
        assert (stats["accepted_tokens"] > 30) == bool(options)
    assert answers[0] == answers[1]
