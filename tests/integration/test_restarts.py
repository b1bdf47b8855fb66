"""`trainer train` starts another attempt after a crash or a preemption, and knows when not to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from project import LONG, Project, Run, is_at_step, wait_for


def is_attempt(run: Run, number: int) -> Callable[[], bool]:
    """Whether so many attempts were begun and the last one makes steps."""
    begun = run.root / "fence" / f"{number:06d}"
    return lambda: begun.exists() and (run.steps() or [0])[-1] > 2


def test_killed_worker_is_started_again_and_loses_nothing(shared: Project) -> None:
    shared.recipe("long.yaml", **LONG)
    whole = shared.worker("long.yaml", "--name", "whole")
    assert whole.code == 0, whole.said
    started = shared.start_trainer("train", "long.yaml", "--name", "crashed")
    run = shared.run("crashed")
    wait_for(is_at_step(run, 15), started)
    os.kill(run.worker_pid(), signal.SIGKILL)
    wait_for(is_at_step(run, 30), started)
    os.kill(run.worker_pid(), signal.SIGTERM)  # the machine asks the worker, nobody asks the supervisor
    done = started.wait()
    assert done.code == 0, done.said
    assert "the worker ended without an outcome" in done.stderr
    assert "preempted: stopped after step " in done.stderr
    assert done.stderr.count("restart 1 of at most 3 without a new checkpoint, in 1 s") == 2
    assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2, 3]
    assert run.values() == shared.run("whole").values()
    assert run.adapter() == shared.run("whole").adapter()


def test_gives_up_without_progress(shared: Project) -> None:
    """A worker that dies in every attempt before a checkpoint."""
    recipe = shared.recipe("never.yaml", **LONG | {"name": "never", "dcp_save_interval": 0, "steps": 5000})
    started = shared.start_trainer(
        "train", recipe, "--set", "recovery.max_restarts=1", "--set", "recovery.restart_backoff_s=0"
    )
    run = shared.run("never")
    for number in (1, 2):
        wait_for(is_attempt(run, number), started)
        os.kill(run.worker_pid(), signal.SIGKILL)
    done = started.wait()
    assert done.code == 1, done.said
    assert done.stderr.count("restart 1 of at most 1") == 1
    assert run.outcome()["state"] == "failed"
    wait_for(lambda: not shared.processes())


def test_a_mistake_of_the_user_is_not_tried_again(shared: Project) -> None:
    recipe = shared.recipe("mistake.yaml", name="mistake", data__max_seq_tokens=16)
    done = shared.trainer("train", recipe)
    assert done.code == 2, done.said
    assert "restart" not in done.stderr
    assert len(shared.run("mistake").attempts()) == 1


def test_run_directory_goes_on_with_its_plan(shared: Project) -> None:
    run = shared.run("never")
    started = shared.start_trainer("train", "runs/never")
    wait_for(is_attempt(run, 3), started)
    started.signal(signal.SIGTERM)
    done = started.wait()
    assert done.code == 75, done.said
    refused = shared.trainer("train", "runs/never", "--set", "steps=3")
    assert refused.code == 2
    assert "go with a recipe" in refused.stderr
