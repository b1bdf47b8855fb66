"""A run under a real Slurm: whatever preempts it, it ends with the bits of a run that nobody disturbs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final

import pytest
import slurm_lab
from project import BIN, LONG, Done, Project, Run, is_at_step, wait_for
from slurm_lab import Lab

pytestmark = pytest.mark.skipif(slurm_lab.missing() is not None, reason=str(slurm_lab.missing()))
RECIPE: Final = LONG | {"recovery__grace_period_s": 20}
PAIR: Final = LONG | {"name": "pair", "rows_per_step": 3, "shape": "cpu2n.yaml", "recovery__grace_period_s": 20}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with slurm_lab.booted() as lab:
        yield lab


@pytest.fixture(scope="module")
def project(shared: Project, lab: Lab) -> Iterator[Project]:
    shape = {
        "name": "cpu2n", "device": "cpu", "device_name": "CPU", "nodes": 2, "gpus": 2, "gpu_memory_gib": 16,
        "micro_batch_tokens": 256, "accelerate": "cpu",
        "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
    }  # fmt: skip
    (shared.root / "cpu2n.yaml").write_text(json.dumps(shape))
    shared.recipe("long.yaml", **RECIPE)
    shared.recipe("pair.yaml", **PAIR)
    yield shared
    lab.stop_jobs()


def trainer(project: Project, lab: Lab, *arguments: str) -> Done:
    done = project.start([str(BIN / "trainer"), *arguments], lab.environment).wait()
    assert done.code == 0, done.said
    return done


def state(project: Project, lab: Lab, name: str) -> str:
    jobs: list[dict[str, Any]] = json.loads(trainer(project, lab, "jobs", "--json").stdout)
    return next(str(job["state"]) for job in jobs if job["job"] == f"runs/{name}")


def slurm_id(run: Run) -> str:
    return str(json.loads((run.root / "job.json").read_text())["slurm_id"])


def wait_for_attempt(run: Run, number: int, steps: int) -> None:
    """Wait until an attempt has made some steps."""
    wait_for((run.root / "fence" / f"{number:06d}").exists)
    wait_for(lambda: json.loads((run.root / "heartbeat.json").read_text())["attempt"] == number)
    wait_for(lambda: json.loads((run.root / "heartbeat.json").read_text())["step"] > 0)
    wait_for(is_at_step(run, run.steps()[-1] + steps))


def test_three_preemptions_leave_no_trace(project: Project, lab: Lab) -> None:
    done = project.worker("long.yaml", "--name", "whole")
    assert done.code == 0, done.said
    whole, run = project.run("whole"), project.run("preempted")
    submitted = trainer(project, lab, "submit", "long.yaml", "--name", "preempted", "--launcher", "slurm", "--time=10")
    assert submitted.stdout == "runs/preempted\n"
    job = slurm_id(run)

    wait_for_attempt(run, 1, 8)
    assert state(project, lab, "preempted") == "RUNNING"
    lab.command("scontrol", "requeue", job)
    wait_for((run.root / "outcome.json").exists)
    assert run.outcome()["state"] == "preempted"
    assert run.checkpoints()[-1] == run.steps()[-1], "saved before it went"
    wait_for(lambda: state(project, lab, "preempted") == "PENDING")
    status = trainer(project, lab, "status", "preempted").stdout
    assert "runs/preempted: pending, step " in status
    assert "in Slurm's queue: " in status

    wait_for_attempt(run, 2, 8)
    worker = run.worker_pid()
    os.kill(worker, signal.SIGSTOP)  # so that the run lasts until Slurm looks at its clock
    lab.command("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: "asked to stop by SIGUSR1" in run.log())
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: "preempted: asking for a requeue" in run.log())
    wait_for(lambda: lab.field(job, "JobState") == "PENDING")
    lab.command("scontrol", "update", f"JobId={job}", "TimeLimit=10")

    wait_for_attempt(run, 3, 8)
    urgent = lab.command("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
                         "--wrap=sleep 1")  # fmt: skip
    wait_for(lambda: run.log().count("preempted: asking for a requeue") == 2)
    wait_for(lambda: lab.field(urgent, "JobState") == "COMPLETED")

    waiting = "import sys; from trainer.jobs import *; print(find_job(sys.argv[1]).wait(200, 0.5).state)"
    waited = project.start([sys.executable, "-c", waiting, "preempted"], lab.environment).wait()
    assert waited.stdout == "finished\n", waited.said
    assert state(project, lab, "preempted") == "COMPLETED"
    assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2, 3, 4]
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
