"""A reward server in one file: `python docs/examples/reward_server.py --port 8765`.

It scores 1.0 if the completion contains the row's answer, and uses the standard library only. Start from it for a
reward that needs another machine, language or model, and use it in a recipe:

    rewards:
      - use: http_reward
        args: {url: "http://localhost:8765"}
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def score(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
    """Replace this function: one number per completion, or None to abstain."""
    answers = columns.get("answer", [None] * len(completions))
    return [
        None if answer is None else float(str(answer) in completion)
        for completion, answer in zip(completions, answers, strict=True)
    ]


class RewardHandler(BaseHTTPRequestHandler):
    """Answers every POST with rewards, and every GET with 200, for health checks."""

    def do_POST(self) -> None:
        """Score one batch."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rewards = score(body["prompts"], body["completions"], body["columns"])
        self.answer(200, {"rewards": rewards})

    def do_GET(self) -> None:
        """Answer a health check."""
        self.answer(200, {"status": "ready"})

    def answer(self, status: int, message: dict[str, Any]) -> None:
        """Send JSON."""
        body = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a training run makes thousands of requests."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    with ThreadingHTTPServer((arguments.host, arguments.port), RewardHandler) as server:
        print(f"listening on http://{arguments.host}:{server.server_port}", flush=True)  # noqa: T201
        server.serve_forever()


if __name__ == "__main__":
    main()
