"""What tests do with `trainer serve --deployments`: ask for deployments, stream from them, see their replicas."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
from project import Project, wait_for
from serving import Server

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


def is_replaced(control: Control, name: str, pid: int) -> bool:
    return pid not in pids(control.get(name))


def pids(about: dict[str, Any]) -> list[int]:
    return [each["pid"] for each in about["status"]["replicas"]]
