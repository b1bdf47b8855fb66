"""What runs on a node of a Ray cluster: the parent of one engine. Imported by Ray's workers; no torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import trainer
from trainer.control.core_dumps import forbid_core_dumps
from trainer.engine.handshake import SECRET_VARIABLE

TAIL_BYTES: Final = 2000
"""Of what an engine said last, for a message."""
LINGER_S: Final = 60.0
"""After its engine's end the actor can be asked why for this long; then it frees its devices."""


class ReplicaActor:
    """One engine process. Ray places this actor and reserves its devices; tokens do not pass through it."""

    def __init__(self, words: list[str], directory: str, secret: str) -> None:
        """Prepare; `start` starts it.

        Args:
            words: arguments of `python -m trainer.engine`, without its address.
            directory: working directory of the control process, which relative paths of models mean.
            secret: clients of the engine must know it.
        """
        self._words, self._directory, self._secret = words, directory, secret
        with tempfile.TemporaryFile() as file:
            self._said = os.dup(file.fileno())
        """What the engine prints: a file without a name, for as long as this process."""
        self._process: subprocess.Popen[bytes] | None = None
        self._address: tuple[str, int] | None = None
        self._is_followed = False

    def begin(self) -> dict[str, Any]:
        """Start the engine on the address that the node has in the cluster."""
        import ray

        found = self.start(ray.util.get_node_ip_address())
        if self._process is not None and not self._is_followed:
            self._is_followed = True
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()
        return {**found, "node": ray.get_runtime_context().get_node_id()}

    def start(self, host: str) -> dict[str, Any]:
        """Start the engine, once; say where it listens.

        Args:
            host: address of this node.
        """
        if self._process is None:
            if not Path(self._directory).is_dir():
                return {"problem": f"{self._directory} does not exist there: every node must see it at the same path"}
            forbid_core_dumps()
            listening = socket.create_server((host, 0))
            self._address = listening.getsockname()[:2]
            handle = str(listening.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.engine", "--tcp-handle", handle, *self._words],
                cwd=self._directory,
                env={**os.environ, SECRET_VARIABLE: self._secret},
                stdin=subprocess.PIPE,  # the engine ends when this process is gone
                stdout=self._said,
                stderr=self._said,
                pass_fds=(listening.fileno(),),
            )
            listening.close()  # or clients of a dead engine would wait for this process to answer
        return self.about()

    def about(self) -> dict[str, Any]:
        """Where the engine is, and why it ended."""
        if self._process is None or self._address is None:
            return {"problem": "the engine was not started"}
        code = self._process.poll()
        return {
            "version": trainer.__version__,
            "address": self._address,
            "secret": self._secret,
            "words": self._words,
            "pid": self._process.pid,
            "code": code,
            "said": "" if code is None else self._tail(),
        }

    def close(self) -> None:
        """End the engine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
        os.close(self._said)

    def _tail(self) -> str:
        size = os.fstat(self._said).st_size
        return os.pread(self._said, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace").strip()

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        time.sleep(LINGER_S)
        os._exit(0)
