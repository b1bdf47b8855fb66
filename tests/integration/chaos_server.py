"""A reward server that may go away and come back."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RewardServer:
    """Scores the share of digits; may go away and come back at its port."""

    def __init__(self) -> None:
        """Serve at any free port."""
        self.port = 0
        self.num_batches = 0
        self.server: ThreadingHTTPServer | None = None
        self.up()

    def up(self) -> None:
        """Serve."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completions"]
                rewards = [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in texts]
                body = json.dumps({"rewards": rewards}).encode()
                outer.num_batches += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Refuse connections."""
        assert self.server is not None
        self.server.shutdown()
        self.server.server_close()
