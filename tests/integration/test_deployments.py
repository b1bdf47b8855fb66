"""`trainer serve --deployments`: scale to zero and back, lost replicas, rolling updates, a killed control process."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import pytest
from adapter_files import adapter_dir
from project import Project, wait_for
from serving import Server, serving
from tiny import tiny_model_dir

CHAT: Final[list[Any]] = [{"role": "user", "content": "what is the sum of 8 and 90?"}]


@dataclass
class Control:
    """A control process with its admin key."""

    server: Server
    project: Project
    key: str

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.request(method, f"{self.server.url}{path}", json=body, headers=headers, timeout=240)

    def get(self, name: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/v1/deployments/{name}").json())

    def create(self, name: str, **changes: Any) -> None:
        body = {"name": name, "model": "model", "shape": "cpu_float32", "scale_down_s": 1, **changes}
        answer = self.call("POST", "/v1/deployments", body)
        assert answer.status_code == 200, answer.text
        self.wait(name, "DEPLOYED")

    def wait(self, name: str, state: str, ready: int | None = None) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            about = self.get(name)
            count = sum(each["is_ready"] for each in about["status"].get("replicas", []))
            is_current = about["observed"] == about["generation"] or state not in ("DEPLOYED", "FAILED")
            return about if about["state"] == state and is_current and ready in (None, count) else {}

        return wait_for(found, self.server.running, poll_s=0.1)

    def ask(self, model: str, **how: Any) -> httpx.Response:
        body = {"model": model, "messages": CHAT, "temperature": 0, "max_tokens": 6, **how}
        return self.call("POST", "/v1/chat/completions", body)

    def text(self, model: str) -> str:
        return str(self.ask(model).json()["choices"][0]["message"]["content"])

    def delete(self, name: str) -> None:
        self.call("DELETE", f"/v1/deployments/{name}")
        self.wait(name, "DELETED")


@dataclass
class Load:
    """Clients that stream without a pause, and what went wrong for them."""

    control: Control
    model: str
    num_whole: int = 0
    problems: list[str] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(240)

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            try:
                problem = self._stream(number)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is None:
                self.num_whole += 1
            else:
                self.problems.append(problem)

    def _stream(self, number: int) -> str | None:
        body = {
            "model": self.model,
            "messages": CHAT,
            "stream": True,
            "max_tokens": 60,
            "seed": number,
            "ignore_eos": True,
        }
        body["stream_options"] = {"include_usage": True}
        headers = {"Authorization": f"Bearer {self.control.key}"}
        url = f"{self.control.server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=240) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code}: {answer.read().decode()}"
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        if events[-1] != "[DONE]":
            return f"the stream ended with {events[-1]}"
        usage = json.loads(events[-2])["usage"]
        return None if usage["completion_tokens"] == 60 else f"{usage['completion_tokens']} tokens"


@pytest.fixture(scope="module")
def control(shared: Project) -> Iterator[Control]:
    adapter_dir(shared.root / "first", shared.root / "model", rank=4, seed=1)
    file = shared.root / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    tiny_model_dir(shared.root / "other", seed=5)
    with serving(shared, "--deployments", "--drain-s", "5") as server:
        yield Control(server, shared, server.running.out.read_text().strip())


def is_replaced(control: Control, name: str, pid: int) -> bool:
    return pid not in pids(control.get(name))


def pids(about: dict[str, Any]) -> list[int]:
    return [each["pid"] for each in about["status"]["replicas"]]


def test_a_deployment_sleeps_is_woken_by_waiting_clients_and_survives_its_replica(control: Control) -> None:
    control.create("sleepy", scale_to_zero_s=1.5)
    first = control.text("sleepy")
    asleep = control.wait("sleepy", "DEPLOYED", ready=0)
    assert pids(asleep) == []
    with Load(control, "sleepy") as load:  # four clients at once: queued, not refused
        woken = control.ask("sleepy")
        wait_for(lambda: load.num_whole >= 4)
        lost = pids(control.get("sleepy"))
        os.kill(lost[0], signal.SIGKILL)  # its streams go on from what they have, on the next replica
        wait_for(lambda: set(pids(control.get("sleepy"))).isdisjoint(lost))
        count = load.num_whole
        wait_for(lambda: load.num_whole >= count + 4)
    assert (woken.status_code, load.problems) == (200, [])
    assert woken.json()["choices"][0]["message"]["content"] == first
    assert [part.partition(";")[0] for part in woken.headers["server-timing"].split(", ")] == ["place", "load", "warm"]
    cold = control.get("sleepy")["status"]["cold_start_s"]
    assert sorted(cold) == ["load", "place", "warm"]
    assert cold["load"] > 0
    rows = control.call("GET", "/v1/usage?by=model").json()["data"]
    assert next(row for row in rows if row["model"] == "sleepy")["replica_us"] > 1_000_000
    control.delete("sleepy")
    assert control.ask("sleepy").status_code == 404


@pytest.mark.heavy
def test_addons_are_loaded_kept_over_zero_and_refused_where_they_are_not_enabled(control: Control) -> None:
    control.create("plain", scale_to_zero_s=60)
    wrong = control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#first", "lora_path": "first"})
    assert (wrong.status_code, "created without addons" in wrong.text) == (400, True)
    control.call("PATCH", "/v1/deployments/plain", {"is_addons_enabled": True})
    control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#first", "lora_path": "first"})
    control.wait("plain", "DEPLOYED")
    base, addon = control.text("plain"), control.text("plain#first")
    assert base != addon
    assert [each["id"] for each in control.call("GET", "/v1/models").json()["data"]] == ["plain", "plain#first"]
    (pid,) = pids(control.get("plain"))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pids(control.get("plain")) not in ([pid], []))
    control.wait("plain", "DEPLOYED", ready=1)
    assert control.text("plain#first") == addon  # the new replica has it
    control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#bad", "lora_path": "nowhere"})
    wait_for(lambda: "addon: " in control.get("plain")["problem"])
    assert control.text("plain#first") == addon
    control.delete("plain")


@pytest.mark.heavy
def test_lost_replicas_an_update_and_more_replicas_fail_no_request(control: Control) -> None:
    control.create("busy", min_replicas=2, max_replicas=2, scale_to_zero_s=60)
    control.wait("busy", "DEPLOYED", ready=2)
    before = control.text("busy")
    with Load(control, "busy") as load:
        wait_for(lambda: load.num_whole >= 4)
        for _ in range(10):
            pid = pids(control.wait("busy", "DEPLOYED", ready=2))[0]
            os.kill(pid, signal.SIGKILL)
            wait_for(functools.partial(is_replaced, control, "busy", pid))
        control.wait("busy", "DEPLOYED", ready=2)
        assert control.call("PATCH", "/v1/deployments/busy", {"model": "other"}).json()["generation"] == 2
        control.wait("busy", "DEPLOYED", ready=2)
        count = load.num_whole
        wait_for(lambda: load.num_whole >= count + 4)
    assert load.problems == []
    assert control.text("busy") != before  # the other model answers
    said = control.server.running.err.read_text()
    assert "which goes on" in said
    control.delete("busy")


@pytest.mark.heavy
def test_an_update_that_fails_leaves_the_old_version(control: Control) -> None:
    control.create("careful", scale_to_zero_s=60)
    before = control.text("careful")
    control.call("PATCH", "/v1/deployments/careful", {"model": "nowhere"})
    about = control.wait("careful", "DEPLOYED")
    assert "nowhere" in about["problem"]
    assert control.text("careful") == before
    wrong = control.call("POST", "/v1/deployments", {"name": "never", "model": "nowhere", "shape": "cpu"})
    assert wrong.status_code == 200
    assert "nowhere" in control.wait("never", "FAILED")["problem"]
    answer = control.ask("never")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deployment_failed")
    control.call("PATCH", "/v1/deployments/never", {"model": "model"})  # what was wrong is changed
    control.wait("never", "DEPLOYED", ready=1)
    control.delete("never")
    control.delete("careful")


@pytest.mark.heavy
def test_a_killed_control_process_is_resumed_by_the_next(project: Project) -> None:
    with serving(project, "--deployments") as server:
        first = Control(server, project, server.running.out.read_text().strip())
        first.create("kept", min_replicas=1, scale_to_zero_s=60)
        old, text = pids(first.wait("kept", "DEPLOYED", ready=1)), first.text("kept")
        first.call("PATCH", "/v1/deployments/kept", {"max_replicas": 2})
        server.running.signal(signal.SIGKILL)
        server.running.process.wait()
    begin = time.monotonic()
    with serving(project, "--deployments") as server:
        second = Control(server, project, first.key)
        about = second.wait("kept", "DEPLOYED", ready=1)
        assert time.monotonic() - begin < 240
        assert set(old).isdisjoint(pids(about))  # replicas end with their control process
        assert about["spec"]["max_replicas"] == 2
        assert second.text("kept") == text
        assert second.call("GET", "/v1/audit/verify").json()["is_whole"] is True
