"""`trainer serve --deployments`: scale to zero and back, lost replicas, rolling updates, a killed control process."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest
from adapter_files import adapter_dir
from deploying import CHAT, Control, Load, is_replaced, pids
from project import Project, wait_for
from serving import serving
from tiny import tiny_model_dir


@pytest.fixture(scope="module")
def control(shared: Project) -> Iterator[Control]:
    adapter_dir(shared.root / "first", shared.root / "model", rank=4, seed=1)
    file = shared.root / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    tiny_model_dir(shared.root / "other", seed=5)
    for name, weights in (("model", "model.safetensors"), ("first", "adapter_model.safetensors")):
        broken = shutil.copytree(shared.root / name, shared.root / f"broken_{name}")
        (broken / weights).write_bytes(b"cut off")
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
    missing = control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#bad", "lora_path": "nowhere"})
    assert (missing.status_code, "nowhere" in missing.text) == (400, True)
    base_model = control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#bad", "lora_path": "other"})
    assert (base_model.status_code, "is a base model" in base_model.text) == (400, True)
    control.call("POST", "/v1/load_lora_adapter", {"lora_name": "plain#bad", "lora_path": "broken_first"})
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
    print(f"10 kills and an update: {load.num_whole} streams, {len(load.problems)} problems {load.problems[:3]}")
    assert load.problems == []
    assert control.text("busy") != before  # the other model answers
    said = control.server.running.err.read_text()
    assert "which goes on" in said
    control.delete("busy")


@pytest.mark.heavy
def test_used_device_hours_end_the_replicas_until_there_are_more(control: Control) -> None:
    control.create("hourly", min_replicas=1, scale_to_zero_s=600)
    first = control.text("hourly")
    limits = {"limits": {"device_hours": 0.0001}}  # a second, which is used soon
    assert control.call("PUT", "/v1/quotas/admin", limits).status_code == 200
    wait_for(lambda: control.ask("hourly").status_code == 429)
    refused = control.ask("hourly")
    assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("device_hours", "3600")
    assert pids(control.wait("hourly", "DEPLOYED", ready=0)) == []  # although its minimum is 1
    assert control.call("PUT", "/v1/quotas/admin", {"limits": {"device_hours": None}}).status_code == 200
    wait_for(lambda: control.ask("hourly").status_code == 200)
    assert control.text("hourly") == first
    control.delete("hourly")


@pytest.mark.heavy
def test_a_batch_wakes_its_deployments_and_goes_on_after_a_kill(project: Project) -> None:
    lines = [
        {"custom_id": f"{model}-{number}", "url": "/v1/chat/completions", "body": {"model": model, "messages": CHAT}}
        for model in ("left", "right", "nobody")
        for number in range(4)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with serving(project, "--deployments") as server:
        first = Control(server, project, server.running.out.read_text().strip())
        for name in ("left", "right"):
            first.create(name, scale_to_zero_s=1)
        for name in ("left", "right"):
            first.wait(name, "DEPLOYED", ready=0)
        client = server.client(first.key)
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        window, endpoint = "24h", "/v1/chat/completions"
        batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window)  # type: ignore[arg-type]
        server.running.signal(signal.SIGKILL)
        server.running.process.wait()
        client.close()
    with serving(project, "--deployments") as server:
        client = server.client(first.key)
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        about = client.batches.retrieve(batch.id)
        assert about.output_file_id is not None
        assert about.error_file_id is not None
        answered = [json.loads(line) for line in client.files.content(about.output_file_id).text.splitlines()]
        failed = [json.loads(line) for line in client.files.content(about.error_file_id).text.splitlines()]
        rows = Control(server, project, first.key).call("GET", "/v1/usage?by=model").json()["data"]
        client.close()
    assert sorted(each["custom_id"] for each in answered) == [line["custom_id"] for line in lines[:8]]
    assert {each["response"]["status_code"] for each in failed} == {404}
    assert len(failed) == 4
    assert {row["model"] for row in rows} == {"left", "right"}


@pytest.mark.heavy
def test_an_update_that_fails_leaves_the_old_version(control: Control) -> None:
    control.create("careful", scale_to_zero_s=60)
    before = control.text("careful")
    refused = control.call("PATCH", "/v1/deployments/careful", {"model": "nowhere"})
    assert (refused.status_code, "nowhere" in refused.text) == (400, True)
    assert control.get("careful")["generation"] == 1
    control.call("PATCH", "/v1/deployments/careful", {"model": "broken_model"})
    about = control.wait("careful", "DEPLOYED")
    assert "broken_model: cannot be loaded" in about["problem"]
    assert control.text("careful") == before
    refused = control.call("POST", "/v1/deployments", {"name": "never", "model": "nowhere", "shape": "cpu"})
    assert (refused.status_code, "nowhere" in refused.text) == (400, True)
    assert control.call("GET", "/v1/deployments/never").status_code == 404
    accepted = control.call("POST", "/v1/deployments", {"name": "never", "model": "broken_model", "shape": "cpu"})
    assert accepted.status_code == 200
    assert "broken_model: cannot be loaded" in control.wait("never", "FAILED")["problem"]
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
