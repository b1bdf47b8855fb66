"""`trainer status` on runs in every state."""

from __future__ import annotations

import json
import signal

import pytest
from project import LONG, Project, Running, is_at_step, wait_for


@pytest.fixture(scope="module")
def running(shared: Project) -> Running:
    """A run that goes on until the test that stops it."""
    started = shared.start_trainer("train", shared.recipe("long.yaml", **LONG | {"steps": 3000}))
    wait_for(is_at_step(shared.run("long"), 3), started)
    return started


def about(project: Project, name: str) -> dict[str, object]:
    done = project.trainer("status", name, "--json")
    assert done.code == 0, done.said
    return dict(json.loads(done.stdout))


def test_unknown_run_names_those_that_are(shared: Project, running: Running) -> None:
    done = shared.trainer("status", "lnog")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == "lnog: no such run. There are: long\n"


def test_running(shared: Project, running: Running) -> None:
    found = about(shared, "long")
    assert (found["state"], found["steps"], found["attempts"]) == ("running", 3000, 1)
    assert isinstance(found["step"], int)
    assert found["step"] >= 3
    assert found["phase"] in {"training", "saving", "evaluating"}
    assert isinstance(found["seconds_left"], float)
    assert "train/loss" in dict(found["metrics"])  # type: ignore[call-overload]


def test_running_for_people(shared: Project, running: Running) -> None:
    done = shared.trainer("status", "runs/long")
    first, second = done.stdout.splitlines()
    assert first.startswith("runs/long: running (")
    assert " of 3000, " in first
    assert first.endswith(" left")
    assert "loss " in second


def test_follow_ends_with_the_run_and_has_its_exit_code(shared: Project, running: Running) -> None:
    followed = shared.start_trainer("status", "long", "--follow")
    wait_for(lambda: "loss" in followed.out.read_text(), followed)
    running.signal(signal.SIGTERM)
    assert running.wait().code == 75
    done = followed.wait()
    assert done.code == 75, done.said
    step = shared.run("long").steps()[-1]
    assert done.stdout.endswith(f"preempted: stopped after step {step} of 3000; the state is saved\n")


def test_preempted(shared: Project, running: Running) -> None:
    """After the test above has stopped it."""
    found = about(shared, "long")
    assert (found["state"], found["phase"], found["seconds_left"]) == ("preempted", None, None)
    assert found["step"] == shared.run("long").steps()[-1]


def test_killed_without_a_word_is_interrupted(shared: Project, running: Running) -> None:
    (shared.run("long").root / "outcome.json").unlink()
    assert about(shared, "long")["state"] == "interrupted"


def test_failed(shared: Project) -> None:
    (shared.root / "cut.jsonl").write_text('{"messages": [{"role": "us')
    done = shared.worker(shared.recipe("cut.yaml", name="cut", data__train="cut.jsonl"))
    assert done.code == 2, done.said
    found = about(shared, "cut")
    assert found["state"] == "failed"
    assert str(found["message"]).startswith("cut.jsonl:1: not JSON")
    assert shared.trainer("status", "cut", "--follow").code == 2


def test_starting_followed_to_finished(shared: Project) -> None:
    started = shared.start_trainer("train", shared.recipe("short.yaml", name="short", steps=2))
    wait_for((shared.run("short").root / "supervisor.lock").exists, started)
    assert about(shared, "short")["state"] == "starting", "importing torch takes longer than asking"
    followed = shared.trainer("status", "short", "--follow")
    assert followed.code == 0, followed.said
    assert started.wait().code == 0
    found = about(shared, "short")
    assert (found["state"], found["step"], found["steps"]) == ("finished", 2, 2)
    assert followed.stdout.splitlines()[-1].startswith("finished 2 steps of runs/short; eval/loss ")
