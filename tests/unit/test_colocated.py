"""vLLM on the GPUs that train sleeps while the policy learns: the protocol, with a small server. No GPU ran it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import pytest
import torch
from small_recipe import RFT, write_small

from trainer.commands.cli import main
from trainer.config.load import find_shape, load_recipe
from trainer.distributed.world import World
from trainer.errors import LaunchError
from trainer.managed.run_servers import refuse_unmanageable
from trainer.managed.vllm import VllmOptions, vllm_argv, vllm_environment
from trainer.planning.memory import BESIDE, PROCESS_GIB, estimate_memory
from trainer.planning.model_facts import ModelFacts
from trainer.sampling.colocated import ColocatedSampler, rest
from trainer.sampling.server_client import SamplerError, ServerClient

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
COLOCATED = ("rollout.sampler=vllm", "rollout.vllm.placement=colocated")


class Server(ThreadingMixIn, UnixStreamServer):
    """Answers as vLLM's development mode does, and writes down what it was asked."""

    daemon_threads = True

    def __init__(self, socket: Path, *, obeys: bool = True) -> None:
        self.calls: list[str] = []
        self.is_sleeping, self.obeys = False, obeys
        super().__init__(str(socket), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/is_sleeping"
        self.answer({"is_sleeping": self.server.is_sleeping})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(self.path)
        self.server.is_sleeping = self.path.startswith("/sleep") and self.server.obeys
        self.answer({"status": "sleeping" if self.server.is_sleeping else "awake"})

    def answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Inner:
    """Writes into the servers' list of calls what it is asked for."""

    draws_apart = True

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers

    def note(self, what: str) -> None:
        for server in self.servers:
            assert not server.is_sleeping
            server.calls.append(what)

    def publish(self, policy: Any, version: int) -> None:
        self.note(f"publish {version}")

    def sample(self, requests: Any, params: Any) -> Any:
        self.note("sample")
        return []


@pytest.fixture
def servers(tmp_path):
    made = [Server(tmp_path / f"{number}.sock") for number in range(2)]
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


def colocated(tmp_path: Path, servers: list[Server]) -> ColocatedSampler:
    clients = [
        ServerClient("http://vllm", model="m", socket=tmp_path / f"{number}.sock") for number in range(len(servers))
    ]
    return ColocatedSampler(Inner(servers), clients, WORLD)


def test_servers_sleep_while_the_policy_learns_and_wake_before_a_publish(tmp_path, servers):
    sampler: Any = colocated(tmp_path, servers)
    for step in range(2):
        sampler.publish(None, step)
        sampler.sample([], None)
        rest(sampler)
        assert all(server.is_sleeping for server in servers), "the policy learns now"
        rest(sampler)  # nothing more
    wanted = ["publish 0", "sample", "/sleep?level=1", "/wake_up", "publish 1", "sample", "/sleep?level=1"]
    assert [server.calls for server in servers] == [wanted, wanted]


def test_nothing_is_drawn_from_a_sleeping_server(tmp_path, servers):
    sampler: Any = colocated(tmp_path, servers)
    sampler.rest()
    with pytest.raises(AssertionError, match="publish before sampling"):
        sampler.sample([], None)


def test_a_server_that_is_started_again_while_the_others_sleep_sleeps_too(tmp_path, servers):
    sampler: Any = colocated(tmp_path, servers)
    sampler.rest()
    again = Server(tmp_path / "again.sock")
    sampler.restored(tmp_path / "again.sock")
    assert again.is_sleeping
    sampler.publish(None, 1)
    awake = Server(tmp_path / "awake.sock")
    sampler.restored(tmp_path / "awake.sock")
    assert awake.calls == []
    for server in (again, awake):
        server.shutdown()
        server.server_close()


def test_a_server_that_does_not_sleep_stops_the_run(tmp_path):
    stubborn = Server(tmp_path / "0.sock", obeys=False)
    sampler = colocated(tmp_path, [stubborn])
    with pytest.raises(SamplerError, match=r"could not be told to sleep: .* was told to sleep and says:"):
        sampler.rest()
    stubborn.shutdown()
    stubborn.server_close()


def test_the_command_has_a_sleep_mode_and_a_share_of_the_memory():
    options = VllmOptions("m", "bfloat16", 512, devices=("0",), max_adapter_rank=8, colocated_frac=0.4)
    argv = vllm_argv(Path("python"), options, Path("s.sock"))
    assert "--enable-sleep-mode" in argv
    assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.4"
    assert vllm_environment(options)["VLLM_SERVER_DEV_MODE"] == "1"
    reserved = VllmOptions("m", "bfloat16", 512, devices=("0",), max_adapter_rank=8)
    assert "--enable-sleep-mode" not in vllm_argv(Path("python"), reserved, Path("s.sock"))
    assert "VLLM_SERVER_DEV_MODE" not in vllm_environment(reserved)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.vllm.placement=colocated"], "needs servers that the run starts"),
        ([*COLOCATED, "rollout.vllm_url=http://127.0.0.1:1"], "needs servers that the run starts"),
        ([*COLOCATED, "rollout.staleness=1", "algorithm.mismatch_cap=2"], "contradicts `rollout.staleness`"),
        (
            [*COLOCATED, "rollout.vllm.arguments=[--gpu-memory-utilization=0.3]"],
            "sets `--gpu-memory-utilization`",
        ),
        (["rollout.sampler=vllm", "rollout.vllm.gpu_memory_frac=0.3"], "has no effect without `placement: colocated`"),
        ([*COLOCATED, "rollout.vllm.gpu_memory_frac=1.0"], "must be less than 1"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(tmp_path)
    write_small(tmp_path, RFT)
    assert main(["check", "recipe.yaml", *(part for each in overrides for part in ("--set", each))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        ("cpu", [], "vLLM on CPUs cannot sleep"),
        ("h100x8_vllm2", [], "which rollout.vllm.placement: colocated would leave idle"),
        ("h100x8", ["rollout.vllm.replicas=3"], "3 do not divide the 8 devices of h100x8"),
        ("h100x8", ["rollout.vllm.python=/nowhere"], "no Python with vLLM"),  # what is looked at after all of these
    ],
)
def test_shapes_that_cannot_work_are_refused(tmp_path, monkeypatch, shape, overrides, message):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_small(tmp_path, RFT), [*COLOCATED, *overrides]).recipe
    with pytest.raises(LaunchError, match=message):
        refuse_unmanageable(recipe, find_shape(shape))


def test_the_estimate_counts_both_phases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = ModelFacts(
        hidden=100, layers=3, query_width=80, key_width=40, intermediate=200, vocab=1000, is_tied=True, heads=8
    )
    shape = find_shape("h100x1")
    file = write_small(tmp_path, RFT)

    def estimate(*overrides: str):
        return estimate_memory(load_recipe(file, overrides).recipe, shape, facts)

    alone, beside = estimate("rollout.sampler=vllm"), estimate(*COLOCATED, "rollout.vllm.gpu_memory_frac=0.25")
    assert "sampling" not in alone.phases
    assert beside.phases["sampling"] == 0.25 * shape.gpu_memory_gib
    assert beside.phases["learning"] == pytest.approx(alone.phases["learning"] + PROCESS_GIB["cuda"])
    assert beside.parts[BESIDE] == 0.25 * shape.gpu_memory_gib, "the model is small: sampling is the peak"
    assert beside.total_gib > 0.25 * shape.gpu_memory_gib + alone.weights_gib + alone.state_gib
    assert not estimate(*COLOCATED, "rollout.vllm.gpu_memory_frac=0.99").fits
