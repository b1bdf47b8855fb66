"""A real HTTP server in a process of its own that answers like an OpenAI-compatible judge, and misbehaves as told.

It gives a completion 1 point per letter "x", up to 10, and is told how to behave by the file `moods`: one JSON line for
each coming request, `{"status": 429, "headers": {...}, "body": ...}`, `{"hang": true}`, `{"hang_if": "needle"}` or
`{"text": "..."}`. Every request is appended to the file `log`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOCK = threading.Lock()


class JudgeHandler(BaseHTTPRequestHandler):
    """Answers chat completions."""

    directory: Path

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mood = self._next_mood(body)
        needle = mood.get("hang_if")
        if mood.get("hang") or (needle and needle in body["messages"][-1]["content"]):
            time.sleep(3600)
        if "slow_s" in mood:
            time.sleep(mood["slow_s"])
        if "status" in mood:
            self._answer(mood["status"], mood.get("body", {"error": "as told"}), mood.get("headers", {}))
        elif "prompts" in body:  # the form of http_reward
            self._answer(200, {"rewards": [min(10, text.count("x")) / 10 for text in body["completions"]]}, {})
        else:
            text = mood.get("text") or json.dumps(verdict(body["messages"]))
            usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            self._answer(200, {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}, {})

    def _next_mood(self, body: dict[str, Any]) -> dict[str, Any]:
        with LOCK:
            record = {"path": self.path, "body": body, "authorization": self.headers.get("Authorization")}
            with (self.directory / "log").open("a") as file:
                file.write(json.dumps(record | {"time": time.monotonic()}) + "\n")
            always, moods = self.directory / "always", self.directory / "moods"
            if always.exists():
                return json.loads(always.read_text())
            lines = moods.read_text().splitlines() if moods.exists() else []
            moods.write_text("".join(line + "\n" for line in lines[1:]))
            return json.loads(lines[0]) if lines else {}

    def _answer(self, status: int, message: Any, headers: dict[str, str]) -> None:
        data = json.dumps(message).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


def verdict(messages: list[dict[str, str]]) -> dict[str, Any]:
    """Points for the letter x in each completion, in whatever form the question asks for."""
    question = next(message["content"] for message in messages if message["role"] == "user")
    found = re.findall(
        r"^\[completion ?(\w*) (\w{8})\]\n(.*?)\n\[end of completion", question, re.DOTALL | re.MULTILINE
    )
    points = [min(10, text.count("x")) for _, _, text in found]
    if found[0][0] == "A":
        return {"reason": "x", "winner": "tie" if points[0] == points[1] else "AB"[points[1] > points[0]]}
    return {"reason": "x", "scores": points} if found[0][0] else {"reason": "x", "score": points[0]}


@dataclass
class JudgeServer:
    """The server as a test sees it."""

    directory: Path
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def will(self, *moods: dict[str, Any]) -> None:
        """How it treats the coming requests."""
        (self.directory / "moods").write_text("".join(json.dumps(mood) + "\n" for mood in moods))

    def always(self, mood: dict[str, Any] | None) -> None:
        """How it treats every request from now on."""
        file = self.directory / "always"
        if mood is None:
            file.unlink()
            return
        new = file.with_name("new")
        new.write_text(json.dumps(mood))
        new.replace(file)

    def requests(self) -> list[dict[str, Any]]:
        """The requests so far."""
        file = self.directory / "log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def kill(self) -> None:
        """As a machine that dies."""
        self.process.kill()
        self.process.wait()


@contextmanager
def judging(directory: Path, port: int = 0) -> Iterator[JudgeServer]:
    """Start the server, and kill it at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(directory), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None
        try:
            yield JudgeServer(directory, int(process.stdout.readline()), process)
        finally:
            process.kill()


if __name__ == "__main__":
    JudgeHandler.directory = Path(sys.argv[1])
    ThreadingHTTPServer.daemon_threads = True
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), JudgeHandler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
