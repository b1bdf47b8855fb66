"""A run that was interrupted anywhere equals one that never was, bit for bit."""

from __future__ import annotations

import random
import signal
from typing import Final

import pytest
from project import LONG, Done, Project, Run, is_at_step, wait_for

SEED: Final = 20
RECIPE: Final = LONG | {"lora__dropout": 0.1, "model__compute_dtype": "bfloat16"}
"""With dropout, and with masters in another precision than the model: state that a resume could lose."""


@pytest.fixture(scope="module")
def whole(shared: Project) -> Run:
    """The uninterrupted run."""
    done = shared.worker(shared.recipe("long.yaml", **RECIPE), "--name", "whole")
    assert done.code == 0, done.said
    return shared.run("whole")


def assert_same(run: Run, whole: Run) -> None:
    assert run.steps() == list(range(61))
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
    assert run.adapter("adapter-best") == whole.adapter("adapter-best")
    assert run.outcome()["state"] == "finished"


def test_killed_at_random_moments(shared: Project, whole: Run) -> None:
    """The machine dies twice: supervisor, launcher and worker at once."""
    moments = random.Random(SEED)
    run = shared.run("killed")
    for _ in range(2):
        step = moments.randint(*((1, 25) if not run.steps() else (30, 55)))
        started = shared.start_trainer("train", "long.yaml", "--name", "killed")
        wait_for(is_at_step(run, step), started, poll_s=moments.uniform(0.001, 0.1))
        shared.kill_all()
        assert not (run.root / "outcome.json").exists(), "killed before it could write an outcome"
    done = shared.trainer("train", "long.yaml", "--name", "killed")
    assert done.code == 0, done.said
    assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2, 3]
    assert_same(run, whole)


def test_killed_while_saving_and_newest_checkpoint_damaged(shared: Project, whole: Run) -> None:
    run = shared.run("saving")
    checkpoints = run.root / "checkpoints"
    wanted = iter(range(6, 60, 6))

    def is_saving() -> bool:
        return any(checkpoints.glob(".step-*.tmp/__0_0.distcp"))

    while not is_saving():  # the first kill may come a moment too late
        started = shared.start_worker("long.yaml", "--name", "saving")
        wait_for(is_at_step(run, next(wanted)), started)
        wait_for(is_saving, started, poll_s=0)
        shared.kill_all()
    newest = run.newest_checkpoint()
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = shared.worker("long.yaml", "--name", "saving")
    assert done.code == 0, done.said
    assert f"{newest.name}/__0_0.distcp: damaged; moved to {newest.name}.broken-1, taking the one before" in done.stderr
    assert (checkpoints / f"{newest.name}.broken-1").is_dir()
    assert not list(checkpoints.glob(".step-*.tmp"))
    assert_same(run, whole)


class TestSignals:
    """One run is stopped by each signal, and once by two Ctrl-C; each test continues it."""

    def stop(self, project: Project, number: signal.Signals, after: int) -> tuple[Run, Done]:
        run = project.run("stopped")
        step = (run.steps() or [0])[-1] + after
        started = project.start_trainer("train", "long.yaml", "--name", "stopped")
        wait_for(is_at_step(run, step), started)
        started.signal(number)
        return run, started.wait()

    def test_sigterm_saves_the_state(self, shared: Project, whole: Run) -> None:
        run, done = self.stop(shared, signal.SIGTERM, 11)
        assert done.code == 75, done.said
        step = run.steps()[-1]
        assert 11 <= step < 60
        assert run.outcome()["state"] == "preempted"
        assert run.checkpoints()[-1] == step, "saved outside the interval"
        assert "run the same command again to resume" in done.stderr
        wait_for(lambda: not shared.processes())

    def test_sigterm_before_the_worker_is_up_loses_nothing(self, shared: Project, whole: Run) -> None:
        run = shared.run("stopped")
        before = run.metrics()
        started = shared.start_trainer("train", "long.yaml", "--name", "stopped")
        wait_for(lambda: "log:" in started.err.read_text(), started)
        started.signal(signal.SIGTERM)
        done = started.wait()
        assert done.code == 75, done.said
        assert run.outcome()["state"] == "preempted"
        assert run.metrics() == before
        wait_for(lambda: not shared.processes())

    def test_ctrl_c_saves_and_says_so(self, shared: Project, whole: Run) -> None:
        run, done = self.stop(shared, signal.SIGINT, 9)
        assert done.code == 75, done.said
        assert "saving after this step, then stopping; press Ctrl-C again to stop at once" in done.stderr
        assert "the state is saved" in done.stderr
        assert run.checkpoints()[-1] == run.steps()[-1]

    def test_fewer_steps_than_the_run_has_made_are_refused(self, shared: Project, whole: Run) -> None:
        run = shared.run("stopped")
        before = run.metrics()
        done = shared.worker("long.yaml", "--name", "stopped", "--set", "steps=5")
        assert done.code == 2, done.said
        assert f"is at step {before[-1]['step']} already; set `steps` to that or more (got 5)" in done.stderr
        assert run.metrics() == before

    def test_ctrl_c_twice_stops_at_once_and_keeps_the_last_checkpoint(self, shared: Project, whole: Run) -> None:
        run = shared.run("stopped")
        saved, attempts = run.checkpoints()[-1], len(run.attempts())
        started = shared.start_trainer("train", "long.yaml", "--name", "stopped")
        wait_for(lambda: len(run.attempts()) > attempts, started)
        started.signal(signal.SIGINT)
        wait_for(lambda: "Ctrl-C again" in started.err.read_text())
        started.signal(signal.SIGINT)
        done = started.wait()
        assert done.code == 1, done.said
        assert run.outcome()["state"] == "cancelled"
        assert f"the newest checkpoint is {run.newest_checkpoint().relative_to(shared.root)}" in done.stderr
        assert run.checkpoints()[-1] >= saved
        wait_for(lambda: not shared.processes())

    def test_ctrl_c_to_a_plain_launcher_saves(self, shared: Project, whole: Run) -> None:
        """A terminal signals the whole process group; the worker must save."""
        run = shared.run("stopped")
        step = run.steps()[-1]
        started = shared.start_worker("long.yaml", "--name", "stopped")
        wait_for(is_at_step(run, step + 3), started)
        started.signal(signal.SIGINT, group=True)
        done = started.wait()
        assert done.code == 75, done.said
        assert "interrupted: saving after this step; Ctrl-C again stops at once" in done.stderr
        assert run.outcome()["state"] == "preempted"

    def test_after_all_that_it_equals_the_whole_run(self, shared: Project, whole: Run) -> None:
        done = shared.worker("long.yaml", "--name", "stopped")
        assert done.code == 0, done.said
        assert_same(shared.run("stopped"), whole)
