"""`trainer serve --with-accounts`: keys, limits, use, audit, retention, in a real server with a tiny model."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import psutil
import pytest
from adapter_files import adapter_dir
from project import Project, wait_for
from serving import Server, serving

CHAT: Final[list[Any]] = [{"role": "user", "content": "what is the sum of 8 and 90?"}]
PRICES: Final = 'models: {"*": {input: 1, output: 2}}\n'


@dataclass
class Served:
    """A server with accounts, and its first admin key."""

    server: Server
    project: Project
    admin: str
    clients: list[openai.OpenAI] = field(default_factory=list)

    def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.admin}"}
        return httpx.request(method, f"{self.server.url}{path}", json=body, headers=headers, timeout=60)

    def account(self, name: str, **limits: Any) -> str:
        """Make an account; returns a key of it."""
        assert self.call("POST", "/v1/accounts", {"name": name}).status_code == 200
        if limits:
            assert self.call("PUT", f"/v1/quotas/{name}", {"limits": limits}).status_code == 200
        return str(self.call("POST", "/v1/keys", {"account": name}).json()["key"])

    def ask(self, key: str, **how: Any) -> Any:
        body = {"model": "model", "messages": CHAT, "temperature": 0, "max_tokens": 6, **how}
        return self.client(key).chat.completions.create(**body)

    def client(self, key: str) -> openai.OpenAI:
        """A client for a key; closed with the server."""
        self.clients.append(self.server.client(key))
        return self.clients[-1]


@pytest.fixture(scope="module")
def served(shared: Project) -> Iterator[Served]:
    adapter_dir(shared.root / "first", shared.root / "model", rank=4, seed=1)
    file = shared.root / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    (shared.root / "prices.yaml").write_text(PRICES)
    arguments = ("model", "--adapter", "first=first", "--with-accounts", "--prices", "prices.yaml")
    more = ("--kv-cache-tokens", "8192", "--batch-dir", "batches", "--traces", "console")
    with serving(shared, *arguments, *more) as server:
        served = Served(server, shared, server.running.out.read_text().strip())
        yield served
        for client in served.clients:
            client.close()


def test_the_first_admin_key_is_printed_once(served: Served) -> None:
    assert re.fullmatch(r"tsk_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", served.admin)
    assert "first admin key, shown only now" in served.server.running.err.read_text()
    assert served.call("GET", "/v1/models").status_code == 200


def test_limits_of_requests_are_exact_under_64_at_once(served: Served) -> None:
    key = served.account("many", requests_per_minute=10)

    async def run() -> list[httpx.Response]:
        body = {"model": "model", "messages": CHAT, "max_tokens": 3}
        headers = {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=served.server.url, headers=headers, limits=limits, timeout=120) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(64)))

    answers = asyncio.run(run())
    refused = [each for each in answers if each.status_code == 429]
    assert ([each.status_code for each in answers].count(200), len(refused)) == (10, 54)
    assert {each.json()["error"]["code"] for each in refused} == {"requests_per_minute"}
    assert all(1 <= int(each.headers["retry-after"]) <= 60 for each in refused)


def test_each_limit_is_a_429_with_its_name(served: Served) -> None:
    with pytest.raises(
        openai.RateLimitError, match=r"credit has 0\.00001 credits left; this request may cost"
    ) as found:
        served.ask(served.account("poor", credit="0.00001"))
    assert (found.value.code, found.value.response.headers["retry-after"]) == ("credit", "3600")
    fast = served.account("fast", tokens_per_minute=150)
    with pytest.raises(openai.BadRequestError, match=r"this request may have .*: a lower max_tokens counts less"):
        served.ask(fast, max_tokens=100)
    served.ask(fast)
    with pytest.raises(openai.RateLimitError) as found:
        served.ask(fast, max_tokens=30)
    assert found.value.code == "tokens_per_minute"
    single = served.account("single", concurrent_requests=1)
    stream = served.ask(single, stream=True, max_tokens=300, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as found:
        served.ask(single)
    assert found.value.code == "concurrent_requests"
    stream.close()  # a client that leaves gives its place back
    wait_for(lambda: _is_free(served, single))


def _is_free(served: Served, key: str) -> bool:
    try:
        served.ask(key)
    except openai.RateLimitError:
        return False
    return True


def test_use_is_counted_by_account_model_and_addon_and_costs_credit(served: Served) -> None:
    key = served.account("spender", credit=1)
    other = served.account("other")
    used = [served.ask(key).usage, served.ask(key, model="first", n=2).usage, served.ask(key, stream=False).usage]
    stream = list(served.ask(key, stream=True, stream_options={"include_usage": True}))
    used.append(stream[-1].usage)
    served.ask(other)
    rows = served.call("GET", "/v1/usage?by=model,addon,day", key=key).json()["data"]
    assert [(row["model"], row["addon"], row["requests"]) for row in rows] == [("model", "", 3), ("model", "first", 1)]
    prompt, completion = sum(each.prompt_tokens for each in used), sum(each.completion_tokens for each in used)
    assert sum(row["prompt_tokens"] for row in rows) == prompt
    assert sum(row["completion_tokens"] for row in rows) == completion
    assert all(row["device_us"] > 0 for row in rows)
    own = served.call("GET", "/v1/quota", key=key).json()
    assert float(own["used"]["credit"]) == pytest.approx((prompt + 2 * completion) / 1e6, abs=1e-9)
    assert served.call("GET", "/v1/usage?account=spender", key=other).status_code == 403
    (row,) = served.call("GET", "/v1/usage?by=account&account=spender").json()["data"]
    assert row["requests"] == 4
    shown = served.project.trainer("usage", "spender", "--by", "addon")
    assert shown.stdout.splitlines()[0].split() == [
        *("addon", "requests", "tokens", "in", "tokens", "out", "trained", "device", "s", "replica", "s", "cost")
    ]
    assert shown.stdout.splitlines()[1].split()[:2] == ["-", "3"]


def test_a_key_reaches_what_its_scope_says_and_ends_when_it_is_revoked(served: Served) -> None:
    key = served.account("scoped")
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/v1/keys"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/v1/audit"),
    ):
        answer = served.call(method, path, key=key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")
    scraper = served.call("POST", "/v1/keys", {"account": "scoped", "scopes": ["metrics"]}).json()["key"]
    assert served.call("GET", "/metrics", key=scraper).status_code == 200
    assert served.call("GET", "/v1/models", key=scraper).status_code == 403
    identity = key.split("_")[1]
    new = served.call("POST", f"/v1/keys/{identity}/rotate", {}).json()["key"]
    assert served.call("GET", "/v1/models", key=key).json()["error"]["message"] == "the key is revoked"
    assert served.call("GET", "/v1/models", key=new).status_code == 200
    served.call("POST", "/v1/accounts/scoped/disable")
    assert served.call("GET", "/v1/models", key=new).json()["error"]["message"] == "the account is disabled"
    assert served.call("POST", "/v1/accounts", {"name": "scoped"}).status_code == 400


def test_control_actions_are_in_the_audit_log_before_the_reply(served: Served) -> None:
    key = served.account("audited", replicas=2)
    served.call("POST", "/v1/load_lora_adapter", {"lora_name": "hot", "lora_path": "first"})
    entries = served.call("GET", "/v1/audit?limit=5").json()["data"]
    admin = f"key {served.admin.split('_')[1]}"
    assert {(each["actor"], each["account"], each["address"]) for each in entries} == {(admin, "admin", "127.0.0.1")}
    assert [(each["action"], each["target"]) for each in entries] == [
        ("account.create", "audited"),
        ("quota.set", "audited"),
        ("keys.create", key.split("_")[1]),
        ("adapters.begin", "POST /v1/load_lora_adapter"),
        ("adapters.end", "POST /v1/load_lora_adapter"),
    ]
    assert entries[-1]["details"] == {"status": 200}
    assert served.call("GET", "/v1/audit/verify").json()["is_whole"] is True


def test_files_have_an_owner_a_lifetime_and_are_deleted(served: Served) -> None:
    owner, other = served.client(served.account("owner")), served.client(served.account("stranger"))
    line = {
        "custom_id": "a",
        "url": "/v1/chat/completions",
        "body": {"model": "model", "messages": CHAT, "max_tokens": 3},
    }
    file = owner.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    assert file.expires_at == file.created_at + 30 * 86400
    with pytest.raises(openai.NotFoundError):
        other.files.content(file.id)
    batch = owner.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        other.batches.retrieve(batch.id)
    assert list(other.batches.list()) == []
    wait_for(lambda: owner.batches.retrieve(batch.id).status == "completed")
    output = owner.batches.retrieve(batch.id).output_file_id
    assert output is not None
    assert json.loads(owner.files.content(output).text)["custom_id"] == "a"
    (row,) = served.call("GET", "/v1/usage?by=account&account=owner").json()["data"]
    assert row["completion_tokens"] == 3
    with pytest.raises(openai.NotFoundError):
        other.files.delete(output)
    for each in (output, file.id):
        assert owner.files.delete(each).deleted
    left = [path.name for path in (served.project.root / "batches").iterdir()]
    assert left == [f"{batch.id}.json"]
    assert [each["action"] for each in served.call("GET", "/v1/audit?limit=2").json()["data"]] == [
        "files.begin",
        "files.end",
    ]


def test_no_prompt_and_no_completion_is_kept_anywhere(served: Served) -> None:
    canary = f"zyx{secrets.token_hex(6)}"
    key = served.account("private")
    text = served.ask(key, messages=[{"role": "user", "content": canary}], max_tokens=40, temperature=1, seed=5)
    completion = text.choices[0].message.content
    assert len(completion) > 10
    list(served.ask(key, messages=[{"role": "user", "content": canary}], stream=True))
    for wrong in (
        {"messages": [{"role": canary, "content": canary}]},
        {"messages": [{"role": "user", "content": f"{canary} <|im_end|>"}]},
        {"messages": [{"role": "user", "content": canary}], "max_tokens": 100_000},
        {"messages": [{"role": "user", "content": canary}], "response_format": {"type": "json_schema"}},
    ):
        with pytest.raises(openai.BadRequestError):
            served.ask(key, **wrong)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    broken = httpx.post(f"{served.server.url}/v1/chat/completions", content=f'{{"a": "{canary}', headers=headers)
    assert (broken.status_code, canary in broken.text) == (400, False)
    kept = {
        "metrics": served.call("GET", "/metrics").text,
        "audit": served.call("GET", "/v1/audit?limit=1000").text,
        "use": served.call("GET", "/v1/usage?by=account,model,addon,day").text,
    }
    engine = served.server.engine()
    for process in (engine, *engine.parents()[:1]):
        assert process.rlimit(resource.RLIMIT_CORE) == (1, 1)  # no core dumps, not even piped ones
    needles = [canary.encode(), completion[:12].encode()]
    said = served.server.running.err
    wait_for(lambda: said.read_text().count('"name": "decode"') >= 2)  # spans of both answers are written
    assert [name for name, words in kept.items() if any(needle in words.encode() for needle in needles)] == []
    written = [*served.project.root.rglob("*"), *Path("/tmp").glob("trainer-serve-*/**/*")]
    files = [file for file in written if file.is_file() and "model" not in file.parts]
    assert len(files) > 5
    assert any(file.name == "store.sqlite" for file in files)
    assert [file for file in files if any(needle in file.read_bytes() for needle in needles)] == []


@pytest.mark.heavy
def test_no_word_of_a_request_is_on_any_writable_disk(served: Served) -> None:
    """The canary is random, so that neither this file nor another test has it."""
    canary, begin = f"zyx{secrets.token_hex(8)}", time.time()
    key = served.account("nowhere")
    served.ask(key, messages=[{"role": "user", "content": canary}])
    list(served.ask(key, messages=[{"role": "user", "content": canary}], stream=True))
    time.sleep(6)  # spans are written every 5 s
    assert written_with(canary.encode(), begin) == []
    probe = served.project.root / "probe.txt"
    probe.write_bytes(b"x" * 5000 + canary.encode())
    assert written_with(canary.encode(), begin) == [probe]  # what the search would find


def written_with(needle: bytes, begin: float) -> list[Path]:
    """Files of every writable disk that changed since a time and have the bytes."""
    found: set[Path] = set()
    disks = [Path(each.mountpoint) for each in psutil.disk_partitions() if "rw" in each.opts.split(",")]
    for disk in {Path("/"), Path("/dev/shm"), *disks}:
        for root, folders, names in os.walk(disk):
            if root in ("/proc", "/sys", "/dev"):
                folders.clear()
            for file in (Path(root, name) for name in names):
                with suppress(OSError, ValueError):  # gone, or emptied, meanwhile
                    about = file.lstat()
                    if not stat.S_ISREG(about.st_mode) or about.st_mtime < begin - 1 or not about.st_size:
                        continue
                    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                        if content.find(needle) >= 0:
                            found.add(file)
    return sorted(found)


def test_while_the_store_is_down_known_keys_serve_and_the_control_plane_is_503(served: Served) -> None:
    key, unused = served.account("steady"), served.account("unused")
    served.ask(key)
    state = served.project.root / "runs" / ".control"
    away = served.project.root / "away"
    state.rename(away)
    try:
        served.call("GET", "/v1/models")  # the admin's key is known from the calls above
        for method, path, body in (
            ("POST", "/v1/accounts", {"name": "late"}),
            ("GET", "/v1/usage", None),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "first"}),
        ):
            answer = served.call(method, path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_down"), path
            assert answer.headers["retry-after"] == "5"
        assert "late" not in served.call("GET", "/v1/models").text
        time.sleep(2.1)  # beyond the time in which keys and limits are not read again
        assert served.ask(key).choices
        assert served.call("GET", "/v1/models", key=unused).status_code == 503  # never checked
    finally:
        shutil.move(away, state)
    wait_for(lambda: served.call("GET", "/v1/models", key=unused).status_code == 200)
    assert served.call("POST", "/v1/accounts", {"name": "late"}).status_code == 200
    (row,) = served.call("GET", "/v1/usage?by=account&account=steady").json()["data"]
    assert row["requests"] == 2  # the one during the outage is counted


@pytest.mark.heavy
def test_https_by_files_and_the_address_that_a_trusted_proxy_names(project: Project) -> None:
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    certificate += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(certificate, cwd=project.root, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ("model", "--with-accounts", "--tls-cert", "cert.pem", "--tls-key", "key.pem", "--port", str(port))
    running = project.start_trainer("serve", *words, "--trusted-proxy", "127.0.0.1")
    context = ssl.create_default_context(cafile=project.root / "cert.pem")
    client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, trust_env=False, timeout=60)

    def is_up() -> bool:
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(is_up, running)
    headers = {"Authorization": f"Bearer {running.out.read_text().strip()}", "X-Forwarded-For": "203.0.113.7"}
    assert client.post("/v1/accounts", json={"name": "team"}, headers=headers).status_code == 200
    (entry,) = client.get("/v1/audit?limit=1", headers=headers).json()["data"]
    assert entry["address"] == "203.0.113.7"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    client.close()
    running.signal(signal.SIGTERM)
    assert running.wait(60).code == 0
