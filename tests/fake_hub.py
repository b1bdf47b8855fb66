"""A server that answers like a model hub for one small file, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

COMMIT: Final = "c0ffee" + "0" * 34
"""What `main` points to."""
FRONT_PAGE: Final = ("", "", "", "", "main", "config.json")
"""Of the hub itself: anything that exists."""


@dataclass
class FakeHub:
    """`owner/model` has a config.json, `owner/gated` refuses access, and there is nothing else."""

    config: bytes
    url: str = ""
    commit: str = COMMIT
    requests: list[str] = field(default_factory=list)
    """For example `HEAD /owner/model/resolve/main/config.json`."""

    def environment(self, cache: str) -> dict[str, str]:
        """Variables that send huggingface_hub here, with this cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": cache, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


@contextmanager
def fake_hub(config: bytes) -> Iterator[FakeHub]:
    """Serve within the block."""
    hub = FakeHub(config)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def respond(self, *, with_body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            _, _, name, _, revision, file = self.path.split("/", 5) if self.path.count("/") > 4 else FRONT_PAGE
            problem = {"gated": (403, "GatedRepo"), "gone": (404, "RepoNotFound")}.get(name)
            if problem is None and revision not in ("main", hub.commit):
                problem = (404, "RevisionNotFound")
            if problem is None and file != "config.json":
                problem = (404, "EntryNotFound")
            if problem is not None:
                self.send_response(problem[0])
                self.send_header("X-Error-Code", problem[1])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("Content-Length", str(len(hub.config)))
            self.end_headers()
            if with_body:
                self.wfile.write(hub.config)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
