"""Deployments on a Ray cluster: three raylets on this machine, regions as labels, and what is killed under load."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import psutil
import pytest
from deploying import Control, Load, pids
from project import Project, wait_for
from ray_cluster import Cluster, Node, ray_cluster
from serving import serving

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'tunesmith[ray]'"),
]
KILLS = int(os.environ.get("RAY_KILLS", "10"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster() as found:
        found.add("eu", 2)
        found.add("eu", 1)
        found.add("us", 1)
        yield found


@pytest.fixture(scope="module")
def control(shared: Project, cluster: Cluster) -> Iterator[Control]:
    with serving(shared, "--deployments", "--backend", "ray", "--ray-address", cluster.address) as server:
        yield Control(server, shared, server.running.out.read_text().strip())


def nodes_of(control: Control, name: str) -> set[str]:
    """Ids of the nodes that have ready replicas."""
    return {each["node"] for each in control.get(name)["status"]["replicas"] if each["is_ready"]}


def test_replicas_are_placed_by_region_up_to_three_and_down_to_none(control: Control) -> None:
    control.create("far", region="us", scale_to_zero_s=600)
    control.create("wide", region="eu", max_replicas=3, scale_up=1, scale_down=0.5, scale_to_zero_s=3, max_wait_s=200)
    control.wait("wide", "DEPLOYED", ready=0)
    assert control.ask("wide").status_code == 200  # waits for a replica
    one = control.wait("wide", "DEPLOYED", ready=1)
    with Load(control, "wide") as load:  # four clients at once
        three = control.wait("wide", "DEPLOYED", ready=3)
        elsewhere = nodes_of(control, "far")
        count = load.num_whole
        wait_for(lambda: load.num_whole >= count + 8)
    assert load.problems == []
    assert len(pids(one)) == 1
    assert len({each["node"] for each in three["status"]["replicas"]}) == 2  # of the two nodes in eu
    assert elsewhere.isdisjoint({each["node"] for each in three["status"]["replicas"]})
    gone = pids(three)
    assert pids(control.wait("wide", "DEPLOYED", ready=0)) == []
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in gone))
    assert control.ask("wide").status_code == 200  # and up again
    control.delete("wide")
    control.delete("far")


def test_a_region_without_a_node_is_waited_for_and_said(control: Control, cluster: Cluster) -> None:
    body = {"name": "moon", "model": "model", "shape": "cpu_float32", "region": "moon", "max_wait_s": 200}
    assert control.call("POST", "/v1/deployments", body).status_code == 200
    wait_for(lambda: "no node of region moon" in json.dumps(control.get("moon")["status"]))
    node = cluster.add("moon", 1)
    assert control.ask("moon").status_code == 200
    control.delete("moon")
    node.end()
    cluster.nodes.remove(node)


def kill_a_replica(control: Control, cluster: Cluster) -> None:
    os.kill(pids(control.get("busy"))[0], signal.SIGKILL)


def kill_a_node(control: Control, cluster: Cluster) -> None:
    """SIGKILL the raylet of a node that has a replica, and start another node like it."""
    found = next(node for node in cluster.nodes if node.region == "eu" and has_replica(node, control))
    found.kill("raylet")
    cluster.replace(found)


def kill_the_placer(control: Control, cluster: Cluster) -> None:
    children = psutil.Process(control.server.running.process.pid).children()
    placer = next(child for child in children if "trainer.serve.ray_placer" in child.cmdline())
    placer.kill()


def kill_the_head(control: Control, cluster: Cluster) -> None:
    """SIGKILL the GCS, and start the head again as its supervisor would."""
    cluster.head.kill("gcs_server")
    cluster.restart_head()


def has_replica(node: Node, control: Control) -> bool:
    below = {child.pid for child in psutil.Process(node.process.pid).children(recursive=True)}
    return not below.isdisjoint(pids(control.get("busy")))


@pytest.mark.parametrize("kill", [kill_a_replica, kill_a_node, kill_the_placer, kill_the_head])
def test_kills_fail_no_request_and_break_no_stream(
    control: Control, cluster: Cluster, kill: Callable[[Control, Cluster], None]
) -> None:
    control.create("busy", region="eu", min_replicas=2, max_replicas=2, scale_to_zero_s=60, max_wait_s=200)
    control.wait("busy", "DEPLOYED", ready=2)
    with Load(control, "busy") as load:
        for _ in range(KILLS):
            count = load.num_whole
            wait_for(lambda count=count: load.num_whole >= count + 4)  # type: ignore[misc]
            kill(control, cluster)
            wait_for(lambda: control.get("busy")["state"] == "DEPLOYED" and len(pids(control.get("busy"))) == 2)
            control.wait("busy", "DEPLOYED", ready=2)
        count = load.num_whole
        wait_for(lambda: load.num_whole >= count + 4)
    print(f"{kill.__name__}: {KILLS} kills, {load.num_whole} streams, {len(load.problems)} problems {load.problems[:3]}")
    assert load.problems == []
    control.delete("busy")


def test_the_next_control_process_finds_the_replicas_of_one_that_was_killed(
    project: Project, cluster: Cluster
) -> None:
    arguments = ("--deployments", "--backend", "ray", "--ray-address", cluster.address)
    with serving(project, *arguments) as server:
        first = Control(server, project, server.running.out.read_text().strip())
        first.create("kept", region="eu", min_replicas=2, max_replicas=2, scale_to_zero_s=60)
        old, text = pids(first.wait("kept", "DEPLOYED", ready=2)), first.text("kept")
        server.running.signal(signal.SIGKILL)
        server.running.process.wait()
    with serving(project, *arguments) as server:
        second = Control(server, project, first.key)
        about = second.wait("kept", "DEPLOYED", ready=2)
        assert sorted(pids(about)) == sorted(old)  # the same processes: no cold start
        assert second.text("kept") == text
        second.delete("kept")
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in old))
