"""A run rolls out on a deployment of two replicas, one of which is killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from typing import Any

import pytest
from deploying import Control, pids
from project import Project, wait_for
from rft_project import NO_EVALUATION, journal, prepare, rollouts, run_here, work
from serving import serving


@pytest.mark.heavy
def test_a_run_rolls_out_on_two_replicas_and_its_journal_replays_to_the_same_bits(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(project)
    killed: list[int] = []
    with serving(project, "--deployments") as server:
        control = Control(server, project, server.running.out.read_text().strip())
        control.create("policy", min_replicas=2, max_replicas=2, scale_to_zero_s=600)
        before = pids(control.wait("policy", "DEPLOYED", ready=2))
        monkeypatch.setenv("OPENAI_API_KEY", control.key)
        root = project.root / "runs" / "deployed"

        def kill() -> None:
            """One replica in the middle of the second step, while a chunk is drawn."""
            wait_for(lambda: any(root.glob("rollouts/step-000001/chunk-*")), poll_s=0.005)
            os.kill(before[0], signal.SIGKILL)
            killed.append(before[0])

        killer = threading.Thread(target=kill)
        killer.start()
        url = f"{server.url}/deployments/policy"
        rollout: dict[str, Any] = {"rollout__sampler": "served", "rollout__server_url": url}
        longer: dict[str, Any] = {"rollout__max_completion_tokens": 40, "data__max_seq_tokens": 256}
        run = run_here(project, "deployed", **NO_EVALUATION, **rollout, **longer)
        killer.join()
        metrics, values, adapter, written = run.metrics(), run.values(), run.adapter(), journal(run)
        assert killed == before[:1]
        after = pids(control.wait("policy", "DEPLOYED", ready=2))
        assert before[0] not in after
        assert before[1] in after
        assert [each["step"] for each in metrics] == [1, 2, 3, 4, 5]
        assert all(each["train/sampler_kl"] < 1e-6 for each in metrics), "float32 on both sides, every version"
        assert all(len(rollouts(run, step)) == 24 for step in range(5))
        names = [each["id"] for each in control.call("GET", "/deployments/policy/v1/models").json()["data"]]
        assert names == ["policy"]  # the run's adapter is gone
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(run.root / name, ignore_errors=True)
        for name in ("metrics.jsonl", "outcome.json"):
            (run.root / name).unlink()
        again = work(project, "deployed.yaml", "deployed")
        assert {each["perf/replayed_chunks"] for each in again.metrics()[1:]} == {6}
        assert journal(again) == written
        assert (again.values(), again.adapter()) == (values, adapter)
        control.delete("policy")
