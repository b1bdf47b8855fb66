"""A sandbox for code rewards on another machine: `python docs/examples/sandbox_server.py --port 8766`.

It runs each request with the sandbox of `code_tests`, on the machine where it is started. Start it in a container
without secrets, or replace `run` by your own service, and use it in a recipe:

    rewards:
      - use: code_tests
        args: {sandbox_url: "http://localhost:8766"}
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainer.rewards.sandbox.client import Sandbox


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Replace this function: run the code, then its tests."""
    sandbox = Sandbox(job["memory_bytes"], allow_weak=False, partial=job["partial"])
    ran = sandbox.run(job["code"], tests=job["tests"], text=job["input"], timeout_s=job["timeout_s"])
    return asdict(ran)


class SandboxHandler(BaseHTTPRequestHandler):
    """Answers every POST with what the code did."""

    def do_POST(self) -> None:
        """Run one job."""
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            status, answer = 200, run(job)
        except RuntimeError as error:  # the sandbox cannot lock itself here
            status, answer = 500, {"error": str(error)}
        body = json.dumps(answer).encode()
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
    parser.add_argument("--port", type=int, default=8766)
    arguments = parser.parse_args()
    with ThreadingHTTPServer((arguments.host, arguments.port), SandboxHandler) as server:
        print(f"listening on http://{arguments.host}:{server.server_port}", flush=True)  # noqa: T201
        server.serve_forever()


if __name__ == "__main__":
    main()
