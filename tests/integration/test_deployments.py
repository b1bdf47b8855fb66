"""`trainer serve --deployments`: scale to zero and back, lost replicas, rolling updates, a killed control process."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Iterator

import pytest
from adapter_files import adapter_dir
from deploying import Control, Load, is_replaced, pids
from project import Project, wait_for
from serving import serving
from tiny import tiny_model_dir

@pytest.fixture(scope="module")
def control(shared: Project) -> Iterator[Control]:
    adapter_dir(shared.root / "first", shared.root / "model", rank=4, seed=1)
    file = shared.root / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    tiny_model_dir(shared.root / "other", seed=5)
    with serving(shared, "--deployments", "--drain-s", "5") as server:
        yield Control(server, shared, server.running.out.read_text().strip())


def test_a_deployment_sleeps_is_woken_by_waiting_clients_and_survives_its_replica(control: Control) -> None:
    control.create("sleepy", scale_to_zero_s=1.5)
    first = control.text("sleepy")
    asleep = control.wait("sleepy", "DEPLOYED", ready=0)
    assert pids(asleep) == []
    with Load(control, "sleepy") as load:  # four clients at once: queued, not refused
        woken = control.ask("sleepy")
        wait_for(lambda: load.num_whole >= 4)
        lost = pids(control.get("sleepy"))
        os.kill(lost[0], signal.SIGKILL)  # its streams go on from what they have, on the next replica
        wait_for(lambda: set(pids(control.get("sleepy"))).isdisjoint(lost))
        count = load.num_whole
        wait_for(lambda: load.num_whole >= count + 4)
    assert (woken.status_code, load.problems) == (200, [])
    assert woken.json()["choices"][0]["message"]["content"] == first
    assert [part.partition(";")[0] for part in woken.headers["server-timing"].split(", ")] == ["place", "load", "warm"]
    cold = control.get("sleepy")["status"]["cold_start_s"]
    assert sorted(cold) == ["load", "place", "warm"]
    assert cold["load"] > 0
    rows = control.call("GET", "/v1/usage?by=model").json()["data"]
    assert next(row for row in rows if row["model"] == "sleepy")["replica_us"] > 1_000_000
    control.delete("sleepy")
    assert control.ask("sleepy").status_code == 404


@pytest.mark.heavy
def test_addons_are_loaded_kept_over_zero_and_refused_where_they_are_not_enabled(control: Control) -> None:
    control.create("plain", scale_to_zero_s=60)
    wrong = control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#first", "lora_path": "first"})
    assert (wrong.status_code, "created without addons" in wrong.text) == (400, True)
    control.call("PATCH", "/v1/deployments/plain", {"is_addons_enabled": True})
    control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#first", "lora_path": "first"})
    control.wait("plain", "DEPLOYED")
    base, addon = control.text("plain"), control.text("plain#first")
    assert base != addon
    assert [each["id"] for each in control.call("GET", "/v1/models").json()["data"]] == ["plain", "plain#first"]
    (pid,) = pids(control.get("plain"))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pids(control.get("plain")) not in ([pid], []))
    control.wait("plain", "DEPLOYED", ready=1)
    assert control.text("plain#first") == addon  # the new replica has it
    control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#bad", "lora_path": "nowhere"})
    wait_for(lambda: "addon: " in control.get("plain")["problem"])
    assert control.text("plain#first") == addon
    control.delete("plain")


@pytest.mark.heavy
def test_lost_replicas_an_update_and_more_replicas_fail_no_request(control: Control) -> None:
    control.create("busy", min_replicas=2, max_replicas=2, scale_to_zero_s=60)
    control.wait("busy", "DEPLOYED", ready=2)
    before = control.text("busy")
    with Load(control, "busy") as load:
        wait_for(lambda: load.num_whole >= 4)
        for _ in range(10):
            pid = pids(control.wait("busy", "DEPLOYED", ready=2))[0]
            os.kill(pid, signal.SIGKILL)
            wait_for(functools.partial(is_replaced, control, "busy", pid))
        control.wait("busy", "DEPLOYED", ready=2)
        assert control.call("PATCH", "/v1/deployments/busy", {"model": "other"}).json()["generation"] == 2
        control.wait("busy", "DEPLOYED", ready=2)
        count = load.num_whole
        wait_for(lambda: load.num_whole >= count + 4)
    assert load.problems == []
    assert control.text("busy") != before  # the other model answers
    said = control.server.running.err.read_text()
    assert "which goes on" in said
    control.delete("busy")


@pytest.mark.heavy
def test_an_update_that_fails_leaves_the_old_version(control: Control) -> None:
    control.create("careful", scale_to_zero_s=60)
    before = control.text("careful")
    control.call("PATCH", "/v1/deployments/careful", {"model": "nowhere"})
    about = control.wait("careful", "DEPLOYED")
    assert "nowhere" in about["problem"]
    assert control.text("careful") == before
    wrong = control.call("POST", "/v1/deployments", {"name": "never", "model": "nowhere", "shape": "cpu"})
    assert wrong.status_code == 200
    assert "nowhere" in control.wait("never", "FAILED")["problem"]
    answer = control.ask("never")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deployment_failed")
    control.call("PATCH", "/v1/deployments/never", {"model": "model"})  # what was wrong is changed
    control.wait("never", "DEPLOYED", ready=1)
    control.delete("never")
    control.delete("careful")


@pytest.mark.heavy
def test_a_killed_control_process_is_resumed_by_the_next(project: Project) -> None:
    with serving(project, "--deployments") as server:
        first = Control(server, project, server.running.out.read_text().strip())
        first.create("kept", min_replicas=1, scale_to_zero_s=60)
        old, text = pids(first.wait("kept", "DEPLOYED", ready=1)), first.text("kept")
        first.call("PATCH", "/v1/deployments/kept", {"max_replicas": 2})
        server.running.signal(signal.SIGKILL)
        server.running.process.wait()
    begin = time.monotonic()
    with serving(project, "--deployments") as server:
        second = Control(server, project, first.key)
        about = second.wait("kept", "DEPLOYED", ready=1)
        assert time.monotonic() - begin < 240
        assert set(old).isdisjoint(pids(about))  # replicas end with their control process
        assert about["spec"]["max_replicas"] == 2
        assert second.text("kept") == text
        assert second.call("GET", "/v1/audit/verify").json()["is_whole"] is True
