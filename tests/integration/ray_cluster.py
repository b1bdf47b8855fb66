"""A Ray cluster on this machine: a head without devices, and raylets that stand for nodes of a region."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from project import BIN, PATIENCE_S, wait_for

OWN_PORTS = [
    "--min-worker-port=0",
    "--max-worker-port=0",
    "--dashboard-agent-listen-port=0",
    "--dashboard-agent-grpc-port=0",
    "--object-store-memory=80000000",
    "--block",
]
"""Ports that the system chooses, since all nodes are on this machine."""


@dataclass
class Node:
    """One `ray start --block`, the leader of a session of its own."""

    region: str
    cpus: int
    process: subprocess.Popen[bytes]

    def child(self, name: str) -> int:
        """Process id of `raylet` or `gcs_server`."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(each.pid for each in children if Path((each.cmdline() or [""])[0]).name == name)

    def kill(self, name: str) -> None:
        """SIGKILL one of its processes; the rest of the node follows, as Ray ends it."""
        os.kill(self.child(name), signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def end(self) -> None:
        """SIGTERM, and SIGKILL for what is left."""
        everybody = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        everybody += [child for each in everybody for child in each.children(recursive=True)]
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        for each in everybody:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@dataclass
class Cluster:
    """Head and nodes."""

    root: Path
    pythonpath: Path
    port: int
    head: Node
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{own_address()}:{self.port}"

    def add(self, region: str, cpus: int) -> Node:
        """Start a node and wait until it is part of the cluster."""
        words = [f"--address={self.address}", f"--num-cpus={cpus}", f"--labels=region={region}", *OWN_PORTS]
        node = Node(region, cpus, start(self.root, self.pythonpath, *words))
        self.nodes.append(node)
        wait_for(lambda: has_started(node))
        return node

    def replace(self, node: Node) -> Node:
        """Start one like a node that was killed."""
        self.nodes.remove(node)
        return self.add(node.region, node.cpus)

    def restart_head(self) -> None:
        """Start the head again, on the same port and with what its GCS kept on disk."""
        self.head = start_head(self.root, self.pythonpath, self.port)


def has_started(node: Node) -> bool:
    assert node.process.poll() is None, "ray start ended"
    with suppress(StopIteration, psutil.Error):
        return bool(node.child("raylet"))
    return False


def own_address() -> str:
    """As Ray finds it: the address of this machine that packets to elsewhere would have."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(root: Path, pythonpath: Path, *words: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(pythonpath),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(root / "gcs"),
    }
    with (root / "ray.log").open("ab") as log:
        return subprocess.Popen(
            [str(BIN / "ray"), "start", *words], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def start_head(root: Path, pythonpath: Path, port: int) -> Node:
    words = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={root}"]
    words += [f"--ray-client-server-port={free_port()}", *OWN_PORTS]
    head = Node("", 0, start(root, pythonpath, *words))
    wait_for(lambda: has_started(head))
    return head


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A head that nodes can join; everything ends with the block."""
    root = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short paths
    pythonpath, port = Path(__file__).parents[2], free_port()
    cluster = Cluster(root, pythonpath, port, start_head(root, pythonpath, port))
    try:
        yield cluster
    finally:
        for node in [*cluster.nodes, cluster.head]:
            node.end()
        shutil.rmtree(root, ignore_errors=True)
