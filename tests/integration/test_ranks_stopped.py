"""Two ranks of an RFT run; one of them is asked to stop while sampling, saving and learning: the bits stay."""

from __future__ import annotations

import json
import signal
import sys

import psutil
import pytest
from project import Project, Run, Running, wait_for
from rft_project import journal, prepare

SHAPE = {
    "name": "cpu2", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16,
    "micro_batch_tokens": 256, "accelerate": "cpu",
    "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
}  # fmt: skip
SLOW = {"SLOW_S": "0.3"}


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    prepare(shared)
    (shared.root / "cpu2.yaml").write_text(json.dumps(SHAPE))
    return shared


def start(project: Project, name: str, environment: dict[str, str] | None = None) -> Running:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "trainer.worker", "rft.yaml"]
    return project.start([*argv, "--shape", "cpu2.yaml", "--name", name], environment)


def second_rank(project: Project, run: Run) -> psutil.Process:
    (found,) = [process for process in project.processes() if is_second_rank(process, run)]
    return found


def is_second_rank(process: psutil.Process, run: Run) -> bool:
    try:
        return process.environ().get("RANK") == "1" and run.root.name in process.cmdline()
    except psutil.NoSuchProcess:  # one that was only short-lived
        return False


def test_a_signal_to_one_rank_in_any_phase_changes_no_bit(project: Project) -> None:
    calm = start(project, "calm")
    run = project.run("stopped")
    argued = start(project, "stopped", SLOW)
    wait_for(lambda: len(journal(run, 0)) >= 2, argued)
    second_rank(project, run).send_signal(signal.SIGUSR1)  # while sampling
    argued.wait()
    assert run.outcome()["state"] == "preempted"
    assert "stopped while sampling step 1" in run.outcome()["message"]
    assert len(journal(run, 0)) >= 2, "what was sampled is kept"

    argued = start(project, "stopped")
    wait_for(lambda: any((run.root / "checkpoints").glob(".step-000002.tmp")), argued, poll_s=0.001)
    second_rank(project, run).send_signal(signal.SIGTERM)  # while saving
    argued.wait()
    assert run.outcome()["state"] == "preempted"
    assert run.checkpoints()[-1] >= 2

    argued = start(project, "stopped")
    before = run.steps()[-1]
    wait_for(lambda: run.steps()[-1] > before or len(journal(run, before)) == 6, argued, poll_s=0.001)
    second_rank(project, run).send_signal(signal.SIGTERM)  # while learning, or a moment later
    argued.wait()
    done = start(project, "stopped").wait()
    whole = calm.wait()
    assert (done.code, whole.code) == (0, 0), done.said + whole.said
    assert run.values() == project.run("calm").values()
    assert run.adapter() == project.run("calm").adapter()
    assert [attempt["ranks"] for attempt in run.attempts()] == [2] * len(run.attempts())
    assert len(run.attempts()) >= 3
