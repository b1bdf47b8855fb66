"""A real `trainer serve` process, and OpenAI's client for it."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
from project import PATIENCE_S, Project, Running


@dataclass
class Server:
    """A server that answers."""

    running: Running
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stats(self) -> dict[str, int]:
        """Gauges of the engine."""
        text = httpx.get(f"{self.url}/metrics").text
        return {name: int(value) for name, value in re.findall(r"^trainer_engine_(\w+) (\d+)$", text, re.MULTILINE)}

    def engine(self) -> psutil.Process:
        """The engine's process."""
        children = psutil.Process(self.running.process.pid).children()
        return next(child for child in children if "trainer.engine" in child.cmdline())

    def wait_idle(self) -> dict[str, int]:
        """The gauges, once nothing is in flight."""
        deadline = time.monotonic() + 20
        while (stats := self.stats())["live"] and time.monotonic() < deadline:
            time.sleep(0.05)
        return stats


@contextmanager
def serving(project: Project, *arguments: str) -> Iterator[Server]:
    """Start a server on a free port, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = project.start_trainer("serve", *arguments, "--port", str(port))
    server = Server(running, port)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert running.process.poll() is None, running.wait().said
        assert time.monotonic() < deadline
        try:
            if httpx.get(f"{server.url}/ready").status_code in (200, 401):  # it listens once its engine answers
                break
        except httpx.TransportError:
            time.sleep(0.1)
    try:
        yield server
    finally:
        if running.process.poll() is None:
            running.signal(signal.SIGTERM)
            running.wait(60)
