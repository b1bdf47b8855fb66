"""A reward worker as its parent process sees it: start, call, kill."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from trainer.errors import RewardError
from trainer.rewards.call_result import HEADER, encode
from trainer.rewards.contract import Form

STARTUP_TIMEOUT_S: Final = 180.0
"""Importing a reward may read gigabytes from a cold disk."""
STDERR_LIMIT_BYTES: Final = 1 << 20
RANK_VARIABLES: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Removed from a worker's environment, so that no library takes it for a training rank."""


class WorkerFailedError(Exception):
    """The worker exited or timed out during a call; the message includes its last output."""


def worker_environment(directory: Path) -> dict[str, str]:
    """The environment variables of a process that runs the user's code.

    Args:
        directory: its TMPDIR.
    """
    root = str(Path(__file__).parents[2])
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])] if "site-packages" not in root else []
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONHASHSEED": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "TMPDIR": str(directory)}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment


@final
class WorkerProcess:
    """A child process that answers one call at a time.

    Not a multiprocessing fork: the parent has torch, threads and perhaps a GPU.
    """

    def __init__(self, setup: Mapping[str, Any], directory: Path) -> None:
        """Start the process without waiting, so that several can load at once; call `await_ready` next.

        Args:
            setup: the first message: the rewards and the memory limit.
            directory: the worker's TMPDIR; the caller removes it, since a killed worker cannot.
        """
        self._stderr = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by kill()
        with _blocked(signal.SIGTERM):  # inherited by the child, which unblocks it when it has a handler
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "trainer.rewards.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,  # its own process group, so that a kill reaches its children
                env=worker_environment(directory),
                bufsize=0,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._inbox = self._process.stdout
        self._outbox = self._process.stdin
        os.set_blocking(self._outbox.fileno(), False)
        self._setup = {**setup, "directory": str(directory)}

    def await_ready(self, timeout_s: float = STARTUP_TIMEOUT_S) -> list[Form]:
        """Wait until the rewards are loaded; returns what one call of each scores.

        Args:
            timeout_s: limit of their imports.

        Raises:
            RewardError: a reward cannot be loaded.
        """
        try:
            reply = self.ask(self._setup, timeout_s)
        except WorkerFailedError as error:
            self.kill()
            raise RewardError(f"a reward worker did not start: {error}") from error
        if "error" in reply:
            self.kill()
            raise RewardError(reply["error"])
        forms: list[Form] = reply["forms"]
        return forms

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a message and return the reply.

        Args:
            message: a call, or the setup.
            timeout_s: wall-clock limit.

        Raises:
            WorkerFailedError: there was no reply in time, or the process exited; kill and replace it.
        """
        deadline = time.monotonic() + timeout_s
        if os.fstat(self._stderr.fileno()).st_size > STDERR_LIMIT_BYTES:
            os.ftruncate(self._stderr.fileno(), 0)
        try:
            self._send(encode(message), deadline)
            body = self._receive(HEADER.unpack(self._receive(HEADER.size, deadline))[0], deadline)
        except TimeoutError:
            raise WorkerFailedError(f"no answer within {timeout_s:g} s{self._stack()}") from None
        except (EOFError, BrokenPipeError):
            raise WorkerFailedError(self._exit_reason()) from None
        reply: dict[str, Any] = json.loads(body)
        return reply

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def interrupt(self) -> None:
        """Kill the process from another thread; a call in progress fails. `kill` must follow."""
        if self._process.returncode is None:
            self._kill_group()

    def kill(self) -> None:
        """Kill the process and its children, and close the pipes; idempotent."""
        self.interrupt()
        self._process.wait()
        for stream in (self._inbox, self._outbox, self._stderr):
            stream.close()

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has just exited
            self._process.kill()

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._outbox.fileno(), select.POLLOUT, deadline)
            view = view[os.write(self._outbox.fileno(), view) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self._inbox.fileno(), select.POLLIN, deadline)
            piece = os.read(self._inbox.fileno(), min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _stack(self) -> str:
        """The stack of the call, from the worker's fault handler, which works even inside C code."""
        before = os.fstat(self._stderr.fileno()).st_size
        os.kill(self._process.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.01)
            if os.fstat(self._stderr.fileno()).st_size > before:
                break
        return self._last_output()

    def _exit_reason(self) -> str:
        """Read the exit status without reaping the process, so that its group can still be killed by id."""
        for _ in range(100):
            status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                break
            time.sleep(0.01)
        self._kill_group()
        code = self._process.wait()
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended itself with status {code}"
        return f"the reward process {ended}{self._last_output()}"

    def _last_output(self) -> str:
        """The end of what the worker and its rewards printed."""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(0, size - 4000)
        text = os.pread(self._stderr.fileno(), size - start, start).decode("utf-8", "replace").strip()
        return f"\n{text}" if text else ""


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back from this thread within the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Wait until a pipe is ready; not `select.select`, which rejects descriptors above 1023."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
