"""A `python` whose processes begin with everything imported, so that a test can afford many real commands.

`ForkedPython` writes `python` and `trainer` into a directory for PATH. Each is a small client that hands its arguments,
its environment and its three streams to a server, which forks and runs the module as `python -m` would. Processes that
a command starts by `sys.executable` begin in the same way. Each has a process group of its own, to which the client
forwards signals; it is killed when its client is.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

PR_SET_PDEATHSIG: Final = 1
CLIENT: Final = """\
#!{python} -SEI
import json, os, signal, socket, sys
is_served = sys.argv[1:2] == ["-m"] or sys.argv[1:2] and sys.argv[1].endswith(".py")
if not is_served or sys.argv[1:3] == ["-m", "trainer.serve"]:  # which refuses to run where torch was imported
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
    server.connect("{place}")
    request = json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    answers = server.makefile("r")
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.killpg(pid, number))
    code = int(answers.readline() or -9)
sys.exit(code if code >= 0 else 128 - code)
"""
TRAINER: Final = '#!/bin/sh\nexec "{client}" -m trainer "$@"\n'


class ForkedPython:
    """The server, and the directory of its clients."""

    def __init__(self, directory: Path) -> None:
        """Start the server and wait until it has imported everything."""
        self.bin = directory / "bin"
        self.bin.mkdir()
        place = directory / "server"
        client = self.bin / "python"
        client.write_text(CLIENT.format(python=sys.executable, place=place))
        (self.bin / "trainer").write_text(TRAINER.format(client=client))
        for script in self.bin.iterdir():
            script.chmod(0o755)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(place), str(client)],
            stdin=subprocess.PIPE,  # its end tells the server that the tests were killed
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def __enter__(self) -> ForkedPython:
        """The running server."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the server and every process that it started: they are of its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()


def serve(place: str, client: str) -> NoReturn:
    """Fork for each connection, until killed."""
    import accelerate.commands.launch  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl  # noqa: F401

    from trainer import worker  # noqa: F401
    from trainer.checks import data_and_rewards  # noqa: F401
    from trainer.export import cli  # noqa: F401
    from trainer.inference import chat, evaluation, generate  # noqa: F401
    from trainer.training import rft, sft  # noqa: F401

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(place)
        listener.listen(64)
        gc.freeze()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os.killpg(0, signal.SIGKILL)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection, client)
            connection.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _answer(connection: socket.socket, client: str) -> NoReturn:
    """Fork once more: the child runs the module, its parent tells the client how it ended."""
    head, handles, _, _ = socket.recv_fds(connection, 4, 3)
    whole = connection.makefile("rb").read(int.from_bytes(head, "big"))
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        connection.close()
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
            os.close(handle)
        code = _become(json.loads(whole), client)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking down what the server imported takes seconds
    os.setpgid(child, child)  # what it starts is in its group, so that the client's signals reach them too
    for handle in handles:
        os.close(handle)
    with suppress(OSError):
        connection.sendall(f"{child}\n".encode())
    process = os.pidfd_open(child)
    if process not in select.select([connection.fileno(), process], [], [])[0]:  # the client was killed
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], client: str) -> int:
    """Run the module or file as the main program."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = client
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    argv = request["argv"]
    sys.argv = argv[1:] if argv[0] == "-m" else argv
    try:
        if argv[0] == "-m":
            if not hasattr(sys.modules.get(argv[1]), "__path__"):
                sys.modules.pop(argv[1], None)  # or runpy warns that it was imported before
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(ended.code + "\n")
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
