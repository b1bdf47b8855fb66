"""Runs that outlive whoever submitted them: real processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Final

import pytest
from project import LONG, Project, Run, is_at_step, paused, wait_for

RECIPE: Final = LONG | {"steps": 120, "eval_interval": 40}
DRIVER: Final = Path(__file__).parents[2] / "docs" / "examples" / "driver.py"
RECONNECT: Final = "import sys; from trainer.jobs import *; print(reconnect_and_wait(sys.argv[1], 0.2).state())"
WAIT: Final = "import sys; from trainer.jobs import *; print(find_job(sys.argv[1]).wait(100).state)"


@pytest.fixture(scope="module")
def whole(shared: Project) -> Run:
    """The run that nobody interrupts."""
    done = shared.worker(shared.recipe("long.yaml", **RECIPE), "--name", "whole")
    assert done.code == 0, done.said
    return shared.run("whole")


def states(project: Project) -> dict[str, str]:
    done = project.trainer("jobs", "--json")
    assert done.code == 0, done.said
    return {job["job"]: job["state"] for job in json.loads(done.stdout)}


def record_pid(run: Run) -> int:
    return int(json.loads((run.root / "job.json").read_text())["pid"])


def test_driver_is_killed_and_its_run_goes_on(shared: Project, whole: Run) -> None:
    """First the driver alone is killed, then everything, as by a machine that dies."""
    run = shared.run("driven")
    argv = [sys.executable, str(DRIVER), "long.yaml", "driven"]
    driver = shared.start(argv)
    wait_for(is_at_step(run, 5), driver)
    driver.signal(signal.SIGKILL, group=True)
    assert driver.wait().stdout.startswith("runs/driven: ")
    at = run.steps()[-1]
    wait_for(is_at_step(run, at + 5))
    driver = shared.start(argv)
    wait_for(lambda: "RUNNING" in driver.out.read_text(), driver)
    assert len(run.attempts()) == 1, "it has joined the run that lives"
    shared.kill_all()
    assert states(shared) == {"runs/driven": "FAILED"}
    done = shared.start(argv).wait()
    assert done.code == 0, done.said
    assert done.stdout.splitlines()[-1].startswith("finished 120 steps of runs/driven; eval/loss ")
    assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2]
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
    assert states(shared) == {"runs/driven": "COMPLETED"}
    again = shared.start(argv).wait()
    assert again.code == 0, again.said
    assert len(run.attempts()) == 2, "a finished run is left as it is"


def test_cancelled_until_it_is_asked_for(shared: Project, whole: Run) -> None:
    run = shared.run("cancelled")
    submitted = shared.trainer("submit", "long.yaml", "--name", "cancelled")
    assert (submitted.code, submitted.stdout) == (0, "runs/cancelled\n"), submitted.said
    second = shared.trainer("submit", "long.yaml", "--name", "cancelled")
    assert second.code == 2, second.said
    wait_for(is_at_step(run, 7))
    with paused(run):
        assert states(shared)["runs/cancelled"] == "RUNNING"
        cancelled = shared.trainer("cancel", "cancelled")
    assert cancelled.code == 0, cancelled.said
    waited = shared.start([sys.executable, "-c", WAIT, "runs/cancelled"]).wait()
    assert waited.stdout == "cancelled\n", waited.said
    step = run.steps()[-1]
    assert step < 120
    assert run.checkpoints()[-1] == step
    assert states(shared)["runs/cancelled"] == "CANCELLED"

    machine = shared.trainer("train", "runs/cancelled", "--resubmitted")
    assert machine.code == 1, machine.said
    assert "was cancelled; `trainer reconnect` or `trainer train` resumes it" in machine.stderr
    assert shared.trainer("cancel", "cancelled").stderr == "runs/cancelled is not running: cancelled\n"

    reconnected = shared.trainer("reconnect", "cancelled")
    assert (reconnected.code, reconnected.stdout) == (0, "runs/cancelled\n"), reconnected.said
    assert run.steps()[-1] > step, "it has waited for a step"
    os.kill(record_pid(run), signal.SIGTERM)  # now the machine takes it away, nobody cancels it
    waited = shared.start([sys.executable, "-c", WAIT, "runs/cancelled"]).wait()
    assert waited.stdout == "preempted\n", waited.said
    assert states(shared)["runs/cancelled"] == "PREEMPTED"
    both = [shared.start([sys.executable, "-c", RECONNECT, "cancelled"]) for _ in range(2)]
    assert {each.wait().stdout for each in both} <= {"RUNNING\n", "COMPLETED\n"}
    assert len(run.attempts()) == 3, "two that reconnect at once start one attempt"
    waited = shared.start([sys.executable, "-c", WAIT, "runs/cancelled"]).wait()
    assert waited.stdout == "finished\n", waited.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()


def test_what_cannot_be_resumed_says_why(shared: Project) -> None:
    recipe = shared.recipe("mistake.yaml", name="mistake", data__max_seq_tokens=16)
    assert shared.trainer("submit", recipe).code == 0
    waited = shared.start([sys.executable, "-c", WAIT, "runs/mistake"]).wait()
    assert waited.stdout == "failed\n", waited.said
    done = shared.trainer("reconnect", "mistake")
    assert done.code == 2, done.said
    assert "runs/mistake cannot be resumed: another attempt would fail the same way: train.jsonl:" in done.stderr
    assert len(shared.run("mistake").attempts()) == 1
    unknown = shared.trainer("reconnect", "mistaek")
    assert unknown.code == 2
    assert unknown.stderr.startswith("mistaek: no such run. There are: ")
