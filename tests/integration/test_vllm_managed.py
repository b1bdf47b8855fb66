"""Real vLLM servers that a run and `trainer serve` start: they answer, are started again, and are never left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import psutil
import pytest
from adapter_files import adapter_dir
from vllm_python import MARKS, MODEL, PYTHON, ROOT, engine_core, is_gone, processes_of_vllm, server_process

pytestmark = MARKS
PATIENCE_S = 1800.0
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT), "TUNESMITH_VLLM_PYTHON": str(PYTHON),
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "managed", "method": "rft", "model": {"path": str(MODEL)}, "lora": {"rank": 8},
    "data": {"train": "train.jsonl", "max_seq_tokens": 128}, "rows_per_step": 2, "steps": 4,
    "optimizer": {"learning_rate": 5e-3}, "dcp_save_interval": 1,
    "rollout": {"group_size": 4, "max_completion_tokens": 16, "sampler": "vllm", "chunk_prompts": 1},
    "rewards": [{"use": "short.py:shortness"}], "shape": "cpu",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {number} + 4?", "answer": str(number + 4)} for number in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short.py").write_text("def shortness(completion, row):\n    return -0.01 * len(completion)\n")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    return tmp_path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_until(is_so: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


def metrics(place: Path) -> list[dict[str, Any]]:
    file = place / "runs" / "managed" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_run_starts_its_engine_survives_its_death_and_ends_it(place):
    training = start(place, "train", "recipe.yaml")
    wait_until(lambda: metrics(place), training)
    processes = processes_of_vllm(training.pid)
    os.kill(engine_core(processes).pid, signal.SIGKILL)
    output, _ = training.communicate(timeout=PATIENCE_S)
    assert training.returncode == 0, output
    log = (place / "runs/managed/logs/attempt-1.log").read_text()
    assert "vLLM server 0 ended (exit code" in log
    assert "vLLM server 0 is ready again" in log
    records = metrics(place)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["train/sampler_kl"] < 0.02 for record in records), "the server had the adapter of each step"
    assert records[-1]["train/ref_kld"] > 0.1
    assert "Application startup complete" in (place / "runs/managed/logs/attempt-1.vllm-0.log").read_text()
    assert all(map(is_gone, processes))
    assert not [each for each in psutil.process_iter() if is_vllm_of(each, place)]


def is_vllm_of(process: psutil.Process, place: Path) -> bool:
    try:
        return process.cwd() == str(place)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_no_engine_outlives_a_trainer_that_is_killed_and_the_run_resumes(place):
    training = start(place, "train", "recipe.yaml")
    wait_until(lambda: metrics(place), training)
    engine = processes_of_vllm(training.pid)
    assert server_process(engine)
    ours = psutil.Process(training.pid).children(recursive=True)
    for each in [psutil.Process(training.pid), *(each for each in ours if each not in engine)]:
        each.kill()
    wait_until(lambda: all(map(is_gone, engine)))
    training.communicate()
    again = start(place, "train", "recipe.yaml")
    output, _ = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, output
    assert [record["step"] for record in metrics(place)] == [1, 2, 3, 4]
    assert (place / "runs/managed/logs/attempt-2.vllm-0.log").is_file()


def test_a_server_that_cannot_start_ends_the_run_with_its_last_words(place):
    arguments = ["--set", 'rollout.vllm.arguments=["--no-such-flag"]']
    training = start(place, "train", "recipe.yaml", *arguments)
    output, _ = training.communicate(timeout=PATIENCE_S)
    assert training.returncode == 2
    assert "vLLM server 0 ended with exit code 2 before it was ready" in output
    assert "unrecognized arguments: --no-such-flag" in output


def test_all_weights_are_published_to_two_servers_that_share_the_prompts(place):
    changes = ["lora=null", "optimizer.learning_rate=2e-5", "steps=2", "rollout.vllm.replicas=2", "dcp_save_interval=0"]
    training = start(place, "train", "recipe.yaml", *(word for change in changes for word in ("--set", change)))
    output, _ = training.communicate(timeout=PATIENCE_S)
    assert training.returncode == 0, output
    first, second = metrics(place)
    assert first["train/ref_kld"] == 0.0
    assert second["train/ref_kld"] > 1e-4, "the weights of step 2 are not the base's,"
    assert second["train/sampler_kl"] < 0.02, "and the servers drew with them"
    for number in (0, 1):
        assert "Application startup complete" in (place / f"runs/managed/logs/attempt-1.vllm-{number}.log").read_text()


# ---- behind the gateway


class Served:
    """`trainer serve --engine vllm` with one adapter."""

    def __init__(self, place: Path) -> None:
        adapter_dir(place / "first", MODEL, rank=8, seed=1, scale=0.02)
        adapter_dir(place / "second", MODEL, rank=8, seed=2, scale=0.02)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--engine", "vllm", "--port", str(self.port), "--adapter", "first=first"]
        options += ["--max-model-tokens", "1024", "--max-adapter-rank", "8"]
        self.process = start(place, "serve", str(MODEL), *options)
        self.url = f"http://127.0.0.1:{self.port}"
        self.place = place

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    try:
        wait_until(made.is_ready, made.process)
        yield made
    finally:
        engine = processes_of_vllm(made.process.pid)
        made.process.terminate()
        made.process.communicate(timeout=120)
        assert made.process.returncode == 0
        assert engine
        assert all(map(is_gone, engine)), "SIGTERM ends vLLM too"


CHAT: Any = [{"role": "user", "content": "Name three colors."}]


def ask(served: Served, model: str = MODEL.name, **how: Any) -> Any:
    """Sixteen tokens, without an end before, unless `how` says otherwise."""
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
    return served.client().chat.completions.create(model=model, messages=CHAT, **settings | how)


def test_it_answers_openais_client_streamed_or_whole_with_and_without_an_adapter(served):
    assert [model.id for model in served.client().models.list().data] == [MODEL.name, "first"]
    base, adapted = ask(served), ask(served, "first")
    assert base.usage.completion_tokens == 16
    assert base.choices[0].message.content != adapted.choices[0].message.content
    for model, whole in ((MODEL.name, base), (f"{MODEL.name}#first", adapted)):
        chunks = list(ask(served, model, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    reported = ask(served, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(reported) == 16
    assert [len(each.top_logprobs) for each in reported] == [3] * 16
    assert reported[0].token == reported[0].top_logprobs[0].token, "greedy takes the likeliest"
    texts = [choice.message.content for choice in ask(served, temperature=1, seed=3, n=3).choices]
    assert len(set(texts)) == 3


def test_structured_output_is_valid(served):
    schema = {
        "type": "object",
        "properties": {"item": {"enum": ["tea", "coffee"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["item", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    answers = ask(served, temperature=1.2, seed=0, n=6, max_tokens=60, response_format=wanted, extra_body=None)
    finished = [each.message.content for each in answers.choices if each.finish_reason == "stop"]
    assert finished
    for text in finished:
        jsonschema.validate(json.loads(text), schema)
    with pytest.raises(openai.BadRequestError, match="`not`"):
        ask(served, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})


def test_nothing_else_of_vllm_can_be_reached(served):
    """A key of vLLM would leave these open: docs/vllm.md."""
    routes = ["/invocations", "/adapters", "/tokenize", "/detokenize", "/scale_elastic_ep", "/openapi.json", "/version"]
    for route in routes:
        assert httpx.get(f"{served.url}{route}").status_code == 404, route
        assert httpx.post(f"{served.url}{route}", json={}).status_code == 404, route
    processes = processes_of_vllm(served.process.pid)
    server = server_process(processes)
    assert not [each for each in server.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    (path,) = {Path(word) for word in server.cmdline() if word.endswith(".sock")}
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_adapter_is_replaced_and_a_broken_one_refused(served):
    before = ask(served, "first").choices[0].message.content
    load = f"{served.url}/v1/load_lora_adapter"
    replaced = httpx.post(load, json={"lora_name": "hot", "lora_path": "first"}, timeout=PATIENCE_S)
    assert replaced.status_code == 200, replaced.text
    assert ask(served, "hot").choices[0].message.content == before
    versions = {replaced.json()["version"]}
    again = httpx.post(load, json={"lora_name": "hot", "lora_path": "second"}, timeout=PATIENCE_S)
    versions.add(again.json()["version"])
    assert len(versions) == 2
    assert ask(served, "hot").choices[0].message.content != before
    broken = adapter_dir(served.place / "broken", MODEL, rank=8, seed=1, scale=float("nan"))
    refused = httpx.post(load, json={"lora_name": "hot", "lora_path": broken.name}, timeout=PATIENCE_S)
    assert refused.status_code == 400
    assert "not finite" in refused.text
    assert httpx.post(f"{served.url}/v1/unload_lora_adapter", json={"lora_name": "hot"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(served, "hot")


def test_a_stream_goes_on_when_vllm_is_killed_and_later_requests_wait_for_it(served):
    before = ask(served, "first").choices[0].message.content
    stream = iter(ask(served, stream=True, temperature=1, seed=1, max_tokens=80))
    for _ in range(5):
        next(stream)
    os.kill(server_process(processes_of_vllm(served.process.pid)).pid, signal.SIGKILL)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    usage = ask(served, stream=False).usage
    assert usage.completion_tokens == 16
    assert ask(served, "first").choices[0].message.content == before, "with its adapter"
