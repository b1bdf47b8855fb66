"""What a vLLM server may answer, and what is made of it; the server is a script here, a real one in integration."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from tiny import tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.distributed.world import World
from trainer.errors import NumericalError
from trainer.model.policy import load_policy
from trainer.sampling import server_client
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.sampling.served import ServedSampler, request_seed
from trainer.sampling.server_client import SamplerError, ServerClient

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
PROMPT = (5, 6, 7)
LOGITS = (9.0, 8.0, 7.5, 7.0, 5.0, 4.0, 3.0)
Script = Callable[[str, dict[str, Any]], tuple[int, Any]]


class FakeServer(ThreadingHTTPServer):
    """Answers as the script says, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.adapters: list[str] = []
        self.mode, self.canary = "processed_logprobs", 0.0
        self.script: Script = lambda _path, _body: (0, None)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((path, body))
        status, said = self.script(path, body)
        if status:
            return status, said
        if path == "/v1/models":
            base = {"id": "base", "root": "/models/base", "parent": None, "max_model_len": 64}
            return 200, {"data": [base, *({"id": name, "parent": "base"} for name in self.adapters)]}
        if path == "/v1/load_lora_adapter":
            self.adapters.append(body["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
        elif "prompt_logprobs" in body:
            found = [None, *({str(token): {"logprob": self.canary}} for token in body["prompt"][1:])]
            return 200, {"model": body["model"], "choices": [{"prompt_logprobs": found}]}
        else:
            return 200, {
                "model": body["model"],
                "choices": [self.choice(body, index) for index in range(body.get("n", 1))],
            }
        return 200, "Success"

    def choice(self, body: dict[str, Any], index: int = 0) -> dict[str, Any]:
        values = dict(zip("abcdefg", logprobs_of(self.mode, body["temperature"] or 1.0), strict=True))
        return {
            "index": index,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [index + 10] * body["max_tokens"],
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [-0.5] * body["max_tokens"], "top_logprobs": [values]},
        }


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.reply(self.server.answer(self.path, {}))

    def do_POST(self) -> None:
        self.reply(self.server.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def reply(self, answer: tuple[int, Any]) -> None:
        status, said = answer
        data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def logprobs_of(mode: str, temperature: float) -> list[float]:
    """Of `LOGITS`, as vLLM's --logprobs-mode defines them."""
    logits = [value / (temperature if mode.startswith("processed") else 1.0) for value in LOGITS]
    total = math.log(sum(math.exp(value) for value in logits)) if mode.endswith("logprobs") else 0.0
    return [value - total for value in logits]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(server_client, "PAUSES_S", (0.0,) * 5)
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), scale=0.0)  # every logprob is -log(320)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(ModelSettings(path=str(model_dir)))


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(ModelSettings(path=str(model_dir)), LoraSettings(rank=4), 0, WORLD.device)


@pytest.fixture
def published(server, tokenizer, policy, tmp_path):
    server.canary = -math.log(320)
    sampler = ServedSampler([ServerClient(server.url, model="m")], tokenizer, WORLD, exchange_dir=tmp_path)
    sampler.publish(policy, 3)
    server.asked.clear()
    return sampler


def params(**changes) -> SamplingParams:
    values: dict[str, Any] = {"max_completion_tokens": 4, "stop_ids": frozenset({2}), "seed": 0, "step": 3}
    return SamplingParams(**values | changes)


def sample(sampler: ServedSampler, **changes):
    return sampler.sample([SampleRequest(PROMPT, 7, 2)], params(**changes))


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_the_logprobs_mode_is_found_by_asking(server, mode):
    server.mode = mode
    assert ServerClient(server.url, model="m").look(PROMPT, 7).logprobs_mode == mode


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_logits_are_no_logprobs(server, mode):
    server.mode = mode
    with pytest.raises(SamplerError, match=r"neither raw nor processed logprobs.* --logprobs-mode processed_logprobs"):
        ServerClient(server.url, model="m").look(PROMPT, 7)


def test_no_server_says_how_to_start_one(monkeypatch, tokenizer):
    monkeypatch.setattr(server_client, "PAUSES_S", (0.0,) * 5)
    with pytest.raises(SamplerError) as caught:
        ServedSampler([ServerClient("http://127.0.0.1:9", model=str(tokenizer.name_or_path))], tokenizer, WORLD)
    text = str(caught.value)
    assert text.startswith("no server at http://127.0.0.1:9 (")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server --model " in text
    assert f"{tokenizer.name_or_path} --host 127.0.0.1 --port 9 --dtype bfloat16 --enable-lora --max-lora-rank " in text


def test_a_server_that_is_busy_is_asked_again(server):
    answers = iter([(503, "busy"), (502, "busy")])
    server.script = lambda _path, _body: next(answers, (0, None))
    assert [card["id"] for card in ServerClient(server.url, model="m").models()] == ["base"]
    assert len(server.asked) == 3


def test_a_connection_that_is_dropped_is_made_again(server):
    def drop_first(_path: str, _body: dict[str, Any]) -> tuple[int, Any]:
        if len(server.asked) == 1:
            raise ConnectionResetError  # the handler ends without an answer
        return 0, None

    server.script = drop_first
    server.handle_error = lambda *_: None
    assert [card["id"] for card in ServerClient(server.url, model="m").models()] == ["base"]
    assert len(server.asked) == 2


def test_a_server_that_does_not_answer_is_named_with_the_limit():
    with socket.create_server(("127.0.0.1", 0)) as stalled:  # accepts and never answers
        url = f"http://127.0.0.1:{stalled.getsockname()[1]}"
        with pytest.raises(SamplerError, match=r"/v1/completions did not answer within 0\.2 s"):
            ServerClient(url, model="m").post("/v1/completions", {}, timeout_s=0.2)


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    assert [card["id"] for card in ServerClient(server.url, model="m").models()] == ["base"]


def test_another_server_at_the_address_is_told_apart(server):
    server.script = lambda _path, _body: (200, "<html>welcome</html>")
    with pytest.raises(SamplerError, match="does not answer as a vLLM server: '<html>welcome"):
        ServerClient(server.url, model="m").models()


def test_publish_loads_the_new_adapter_and_unloads_the_old(server, published, policy):
    first = published.name
    published.publish(policy, 4)
    assert server.adapters == [published.name]
    assert published.name != first
    assert "." not in published.name
    paths = [path for path, _body in server.asked]
    assert paths.index("/v1/load_lora_adapter") < paths.index("/v1/unload_lora_adapter")


def test_nothing_is_left_behind(server, published, tmp_path):
    assert len(list(tmp_path.glob("tunesmith-*/tunesmith-*/adapter_model.safetensors"))) == 1
    finalizer = published.finalizer
    finalizer()
    assert server.adapters == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (404, None, "does not load adapters at run time. Start it with:\n  VLLM_ALLOW_RUNTIME"),
        (500, "LoRA is not enabled. Use --enable-lora to enable LoRA.", "was started without --enable-lora"),
        (500, "LoRA rank 4 is greater than max_lora_rank 1.", "Start it with --max-lora-rank 8, or lower lora.rank."),
        (404, "Loading lora x failed: No adapter found for /tmp/x", "must see the same file system as the main rank"),
        (500, "Call failed: Worker failed with error 'odd', please check the stack trace above", "HTTP 500: odd"),
    ],
)
def test_a_refused_adapter_says_what_to_change(server, published, policy, status, said, message):
    answer = {"detail": "Not Found"} if said is None else {"error": {"message": said}}
    server.script = lambda path, _body: (status, answer) if path == "/v1/load_lora_adapter" else (0, None)
    with pytest.raises(SamplerError) as caught:
        published.publish(policy, 4)
    assert message in str(caught.value)
    assert published.version == 3


def test_an_adapter_whose_first_answer_was_lost_is_loaded_once(server, published, policy):
    def lose_first(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/v1/load_lora_adapter" or body["lora_name"] in server.adapters:
            return (400, {"error": {"message": "already loaded"}}) if path == "/v1/load_lora_adapter" else (0, None)
        server.adapters.append(body["lora_name"])
        return 503, "proxy went away"

    server.script = lose_first
    published.publish(policy, 4)
    assert server.adapters == [published.name]


def test_a_server_that_computes_something_else_is_refused(server, published, policy):
    server.canary = -math.log(320) - 0.3
    with pytest.raises(NumericalError, match=r"are 0\.3 away from those of"):
        published.publish(policy, 4)


def test_a_request_leaves_nothing_to_the_servers_defaults(server, published):
    (group,) = sample(published, temperature=0.7, stop=("\n",))
    assert [each.token_ids for each in group] == [(10,) * 4, (11,) * 4]
    assert {each.policy_version for each in group} == {3}
    ((path, body),) = server.asked
    assert path == "/v1/completions"
    assert body == {
        "model": published.name, "prompt": list(PROMPT), "n": 2, "seed": request_seed(0, 3, 7), "max_tokens": 4,
        "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop": ["\n"], "stop_token_ids": [2],
        "ignore_eos": True, "skip_special_tokens": False, "logprobs": 0, "return_token_ids": True,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


def test_equal_greedy_completions_are_drawn_once(server, published):
    (group,) = sample(published, is_greedy=True)
    assert group[0] == group[1]
    assert [(body["n"], body["temperature"]) for _path, body in server.asked] == [(1, 0.0)]


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("raw_logprobs", {"temperature": 0.7}, "--logprobs-mode processed_logprobs, or set rollout.temperature to 1"),
        ("raw_logprobs", {"temperature": 0.7, "top_p": 0.9}, "vLLM has no logprobs of the untruncated distribution"),
        ("raw_logprobs", {"top_p": 0.9}, None),
        ("raw_logprobs", {}, None),
        ("processed_logprobs", {"temperature": 0.7}, None),
        ("processed_logprobs", {"top_p": 0.9}, "--logprobs-mode raw_logprobs"),
        ("processed_logprobs", {"top_k": 5}, "--logprobs-mode raw_logprobs"),
        ("processed_logprobs", {"min_p": 0.1}, "--logprobs-mode raw_logprobs"),
        ("processed_logprobs", {"top_p": 0.9, "is_greedy": True}, None),  # truncation does not touch the likeliest
        ("processed_logprobs", {"temperature": 0.7, "is_greedy": True}, "at temperature 1 only"),
        ("processed_logprobs", {"max_completion_tokens": 62}, "need 65 tokens, and .* takes 64"),
    ],
)
def test_logprobs_of_another_distribution_are_refused(server, tokenizer, policy, tmp_path, mode, changes, message):
    server.mode, server.canary = mode, -math.log(320)
    sampler = ServedSampler([ServerClient(server.url, model="m")], tokenizer, WORLD, exchange_dir=tmp_path)
    sampler.publish(policy, 3)
    if message is None:
        sample(sampler, **changes)
        return
    with pytest.raises(SamplerError, match=message):
        sample(sampler, **changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": None}, SamplerError, "use a newer vLLM"),
        ({"token_ids": [1, 2, 3]}, SamplerError, "lost logprobs"),
        ({"prompt_token_ids": [1, *PROMPT]}, SamplerError, "changed the prompt"),
        ({"finish_reason": "stop", "stop_reason": 9}, SamplerError, "--generation-config vllm"),
        ({"finish_reason": "stop", "stop_reason": "\n"}, SamplerError, "--generation-config vllm"),
        ({"finish_reason": "abort"}, SamplerError, "ended a completion after 4 tokens"),
        ({"logprobs": {"token_logprobs": [-0.5, -9999.0, -0.5, -0.5]}}, NumericalError, "not finite"),
        ({"logprobs": {"token_logprobs": [-0.5, None, -0.5, -0.5]}}, NumericalError, "not finite"),
        (
            {"token_ids": [], "finish_reason": "stop", "logprobs": {"token_logprobs": []}},
            SamplerError,
            "after 0 tokens",
        ),
        ({"token_ids": [1], "logprobs": {"token_logprobs": [-0.5]}}, SamplerError, "ended a completion after 1 tokens"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_refused(server, published, change, error, message):
    def script(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"model": body["model"], "choices": [server.choice(body, index) | change for index in range(2)]}

    server.script = script
    with pytest.raises(error, match=message):
        sample(published)


@pytest.mark.parametrize("change", [{"token_ids": [9, 9, 2]}, {"token_ids": [9, 9, 9], "stop_reason": "\n"}])
def test_a_completion_may_end_by_the_recipes_stops(server, published, change):
    ended = change | {"finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5] * 3}}
    server.script = lambda _path, body: (200, {"model": body["model"], "choices": [server.choice(body) | ended] * 2})
    (group,) = sample(published, stop=("\n",))
    assert [(each.token_ids, each.finish_reason) for each in group] == [(tuple(change["token_ids"]), "stop")] * 2


def test_an_answer_of_another_adapter_stops_the_run(server, published):
    server.script = lambda _path, body: (200, {"model": "base", "choices": [server.choice(body)]})
    with pytest.raises(NumericalError, match="answered with base instead of tunesmith-"):
        sample(published)


def test_seeds_of_rows_steps_and_runs_differ():
    seeds = {request_seed(seed, step, row) for seed in range(3) for step in range(3) for row in range(3)}
    assert len(seeds) == 27
    assert max(seeds) < 2**62
