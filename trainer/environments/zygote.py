"""The process that imports the environment once and forks a child per rollout: `python -m trainer.environments.zygote`.

Its argument is the descriptor of its control socket. A request `fork` carries two descriptors, the child's own socket
and its standard error; `wait` kills a child's process group and returns how it ended. When the trainer's end of the
socket closes, all children are killed. Each child answers one call at a time, under a memory limit; the trainer
enforces the time limit.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from trainer.environments.channel import Channel
from trainer.environments.contract import Turn
from trainer.environments.loading import load_environment, load_tools
from trainer.environments.mcp_tools import McpSettings, ToolServers
from trainer.environments.session import Session, group_rewards
from trainer.environments.tools import Tool
from trainer.errors import RewardError
from trainer.types import Row, ToolCall

PR_SET_PDEATHSIG: Final = 1
MAX_FAILURE_CHARACTERS: Final = 8000


def main() -> None:
    """Load, then fork on request until the trainer is gone."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    setup = control.receive(None)
    try:
        environment = _environment(setup)
        tools = load_tools(setup["tools"], Path(setup["base_dir"]))
    except RewardError as error:
        control.send({"error": str(error)}, None)
        return
    servers = [McpSettings.of(each) for each in setup["servers"]]
    try:
        schemas = [tool.schema for tool in tools.values()] + (_probed(servers, setup) if servers else [])
    except RewardError as error:
        control.send({"error": str(error)}, None)
        return
    control.send({"schemas": schemas, "compares": hasattr(environment, "group_rewards")}, None)
    children: set[int] = set()
    with suppress(EOFError, ConnectionError):
        while True:
            request, descriptors = control.receive_with_descriptors()
            if "fork" in request:
                zygote, pid = os.getpid(), os.fork()
                if pid == 0:
                    control.close()
                    _child(zygote, descriptors, setup, environment, tools)
                for descriptor in descriptors:
                    os.close(descriptor)
                children.add(pid)
                control.send({"pid": pid}, None)
            else:
                children.discard(request["wait"])
                control.send({"status": _end(request["wait"], request["grace_s"])}, None)
    for pid in children:
        _end(pid)


def _environment(setup: Mapping[str, Any]) -> type[Any] | None:
    """The class of the recipe's environment, if it has one."""
    named = setup["environment"]
    if isinstance(named, str):
        return load_environment(named, Path(setup["base_dir"]))
    if named is None:
        return None
    from trainer.environments.verifiers_adapter import verifiers_environment

    sys.path.insert(0, setup["base_dir"])
    paths = [setup["base_dir"], *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for tool servers that verifiers starts
    return verifiers_environment(named["verifiers"], named["config"], named["max_turns"])


def _probed(servers: Sequence[McpSettings], setup: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Schemas of the tool servers' tools, from a child that starts them once: the client has threads.

    Raises:
        RewardError: one does not start.
    """
    with suppress(ImportError):  # for all rollouts at once; where it is missing, the child says so
        import mcp  # noqa: F401
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(reading)
            _limit_memory(setup["memory_limit_bytes"])
            running = ToolServers(servers, Path(setup["base_dir"]))
            try:
                answer: dict[str, Any] = {"schemas": [tool.schema for tool in running.start()]}
                running.close()
            except RewardError as error:
                answer = {"error": str(error)}
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                json.dump(answer, pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        raise RewardError(f"tool servers did not start: {', '.join(each.shown for each in servers)}")
    answer = json.loads(text)
    if "error" in answer:
        raise RewardError(answer["error"])
    schemas: list[dict[str, Any]] = answer["schemas"]
    return schemas


def _end(pid: int, grace_s: float = 0.0) -> int:
    """Kill a child and what it started; returns its wait status as `os.waitstatus_to_exitcode` gives it.

    Args:
        pid: of the child.
        grace_s: how long it may take to end by itself.
    """
    end = time.monotonic() + grace_s
    done, status = os.waitpid(pid, os.WNOHANG)  # its own end, where it ended by itself
    while not done and time.monotonic() < end:
        time.sleep(0.002)
        done, status = os.waitpid(pid, os.WNOHANG)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not done:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _child(
    zygote: int,
    descriptors: list[int],
    setup: Mapping[str, Any],
    environment: type[Any] | None,
    tools: Mapping[str, Tool],
) -> None:
    """Serve one rollout; never returns."""
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != zygote:  # it died before the line above
            return
        channel = Channel(socket.socket(fileno=descriptors[0]))
        for stream in (1, 2):
            os.dup2(descriptors[1], stream)
        faulthandler.register(signal.SIGUSR1)  # the trainer asks for the stack of a call that hangs
        _limit_memory(setup["memory_limit_bytes"])
        servers = [McpSettings.of(each) for each in setup["servers"]]
        running = ToolServers(servers, Path(setup["base_dir"]))
        _serve(channel, environment, lambda: Session(environment, tools, setup["errors"], running))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(channel: Channel, environment: type[Any] | None, open_session: Any) -> None:
    session: Session | None = None
    with suppress(EOFError, ConnectionError):
        while True:
            call = channel.receive(None)
            try:
                if "reset" in call:
                    session = open_session()
                    reply = session.reset(Row(**call["reset"]), call["messages"], call["seed"])
                elif "turn" in call:
                    assert session is not None, "reset comes first"
                    reply = session.step(_turn(call["turn"]))
                elif "group" in call:
                    assert environment is not None
                    reply = {"values": group_rewards(environment, call["group"])}
                else:
                    if session is not None:
                        session.close()
                    return
            except BaseException as error:  # SystemExit too: it must not look like a normal end
                trace = error.__traceback__.tb_next if error.__traceback__ else None
                text = "".join(traceback.format_exception(type(error), error, trace))
                reply = {"failure": text[-MAX_FAILURE_CHARACTERS:]}
            try:
                channel.send(reply, None)
            except TypeError as error:
                channel.send({"failure": f"the environment returned what is no JSON: {error}"}, None)


def _turn(wire: Mapping[str, Any]) -> Turn:
    return Turn(**{**wire, "calls": tuple(ToolCall(**call) for call in wire["calls"])})


def _limit_memory(limit_bytes: int) -> None:
    """Limit the address space, in addition to what the zygote has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
