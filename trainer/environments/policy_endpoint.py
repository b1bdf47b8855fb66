"""An endpoint of OpenAI's chat API whose answers are the turns of a rollout: for frameworks that call the model.

The framework's request waits until the trainer has drawn the turn. It listens on the loopback interface, with a key.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, final

MODEL: Final = "policy"


class PolicyRequest:
    """A model call that waits for its answer."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Keep the call.

        Args:
            body: of the request: `messages`, and `tools` where there are some.
        """
        self.body = body
        self._answer: queue.Queue[dict[str, Any]] = queue.Queue(1)

    def answer(self, message: Mapping[str, Any]) -> None:
        """Give the assistant's message."""
        choice = {
            "index": 0,
            "message": dict(message),
            "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
        }
        self._answer.put({"id": "turn", "created": 0, "model": MODEL, "choices": [choice]})

    def wait(self) -> dict[str, Any]:
        """The completion, once there is one."""
        return self._answer.get()


@final
class PolicyEndpoint:
    """The server of one rollout; requests appear in `calls`."""

    def __init__(self) -> None:
        """Listen on a port that the operating system chooses."""
        self.key = secrets.token_urlsafe(24)
        self.calls: queue.Queue[PolicyRequest] = queue.Queue()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                if not secrets.compare_digest(self.headers.get("Authorization", ""), f"Bearer {endpoint.key}"):
                    self._reply(401, "application/json", json.dumps({"error": {"message": "wrong key"}}))
                elif not self.path.endswith("/chat/completions"):
                    text = f"the policy answers chat completions only, not {self.path}"
                    self._reply(404, "application/json", json.dumps({"error": {"message": text}}))
                else:
                    request = PolicyRequest(body)
                    endpoint.calls.put(request)
                    completion = request.wait()
                    if body.get("stream"):
                        self._reply(200, "text/event-stream", _as_stream(completion))
                    else:
                        whole = {"object": "chat.completion", **completion}
                        self._reply(200, "application/json", json.dumps(whole))

            def _reply(self, status: int, kind: str, text: str) -> None:
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _as_stream(completion: Mapping[str, Any]) -> str:
    """A completion as server-sent events: all of it in one, then its end."""
    (choice,) = completion["choices"]
    delta = dict(choice["message"])
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
    head = {**completion, "object": "chat.completion.chunk"}
    whole = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    return "".join(f"data: {json.dumps(event)}\n\n" for event in (whole, end)) + "data: [DONE]\n\n"
