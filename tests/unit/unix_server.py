"""A small real server for tests of supervision: `python unix_server.py SOCKET DIRECTORY MODE`.

It writes the process ids of itself and of a child, which is in a session of its own, to DIRECTORY/pids-N for its Nth
start, and answers GET /health and POST /v1/completions. MODE says what goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer


class Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(503 if MODE == "sick" else 200, {"status": MODE, "start": START})
        if MODE == "short":
            threading.Timer(0.2, lambda: os._exit(7)).start()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if MODE == "hangs-once" and START == 1:
            (DIRECTORY / "asked").touch()
            time.sleep(3600)
        self.answer(200, {"start": START})

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    SOCKET, DIRECTORY, MODE = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    START = 1 + len(list(DIRECTORY.glob("pids-*")))
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    note = DIRECTORY / f".pids-{START}"
    note.write_text(json.dumps([os.getpid(), below.pid]))
    note.rename(DIRECTORY / f"pids-{START}")
    print(f"start {START} as {MODE}", flush=True)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "broken" or (MODE == "breaks-later" and START > 1):
        sys.exit("no such model: the last words")
    Server(SOCKET, Handler).serve_forever()
