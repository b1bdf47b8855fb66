"""Serves the page of runs on this machine only, while they train."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, final
from urllib.parse import parse_qs, urlsplit

from trainer.errors import TrainerError, UserError
from trainer.report.page import page, report_data, script_json
from trainer.report.run_report import RunReporter
from trainer.run.console import tell

ADDRESS: Final = "127.0.0.1"


@final
class LiveReport:
    """The newest report of some runs; read again only where a file has changed."""

    def __init__(self, reporters: Sequence[RunReporter]) -> None:
        """Nothing is read yet."""
        self._reporters = reporters
        self._lock = threading.Lock()
        self._known: tuple[str, dict[str, Any]] | None = None

    def version(self) -> str:
        """Changes when the report would."""
        states = json.dumps([reporter.version() for reporter in self._reporters], default=str)
        return hashlib.sha256(states.encode()).hexdigest()[:16]

    def read(self) -> tuple[str, dict[str, Any]]:
        """The version, and the data of the page."""
        with self._lock:
            version = self.version()  # before reading: what is written meanwhile gives another version
            if self._known is None or self._known[0] != version:
                reports = [reporter.read() for reporter in self._reporters]
                plans = [reporter.run.read_plan() for reporter in self._reporters]
                self._known = (version, report_data(reports, plans))
            return self._known


def make_server(live: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server that answers `/` with the page and `/data?version=` with news, or 204 where there are none.

    Requests that name another host are refused, so that no web page can read runs through a name that resolves to this
    machine.

    Args:
        live: what it serves.
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        """Answers one request."""

        def do_GET(self) -> None:
            """Page, news, or an error in words."""
            known = {f"{host}:{server.server_port}" for host in (ADDRESS, "localhost")}
            if self.headers.get("Host") not in known:
                return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this host name is not served")
            url = urlsplit(self.path)
            if url.path not in {"/", "/data"}:
                return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there are / and /data")
            try:
                if url.path == "/":
                    return self._answer(HTTPStatus.OK, "text/html", page(live.read()[1], is_live=True))
                return self._news(parse_qs(url.query).get("version", [""])[0])
            except (TrainerError, OSError) as error:  # the run was deleted, or moved
                return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error))

        def _news(self, known_version: str) -> None:
            if known_version == live.version():
                return self._answer(HTTPStatus.NO_CONTENT, "text/plain", "")
            version, data = live.read()
            text = f'{{"version":{json.dumps(version)},"data":{script_json(data)}}}'
            return self._answer(HTTPStatus.OK, "application/json", text)

        def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Requests are not logged."""

    try:
        server = ThreadingHTTPServer((ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {getattr(error, 'strerror', None) or error}. Name another port.") from None
    return server


def serve(reporters: Sequence[RunReporter], port: int) -> None:
    """Serve until Ctrl-C.

    Args:
        reporters: of the runs.
        port: 0 takes a free one.
    """
    with make_server(LiveReport(reporters), port) as server:
        tell(f"http://{ADDRESS}:{server.server_port}/ follows the runs; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            tell("")
