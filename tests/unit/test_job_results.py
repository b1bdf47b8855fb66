"""What a script gets of a job: metrics as they come, attempts, best value, weights; and its end."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from small_recipe import write_small

from trainer import Job
from trainer.config.load import load_recipe
from trainer.errors import LaunchError
from trainer.jobs import find_job, jobs
from trainer.jobs.state import JobRecord, write_record
from trainer.planning.plan import make_plan
from trainer.run.best import BestValue
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.state import Outcome

OUTCOME = Outcome("finished", 10, "words", 0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of ten steps that has not begun."""
    monkeypatch.chdir(tmp_path)
    return open_run(make_plan(load_recipe(write_small(tmp_path))))


@pytest.fixture
def job(run: RunDir) -> Job:
    return find_job("small")


def log(run: RunDir, *records: dict[str, float]) -> None:
    with run.metrics_file.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_metrics_are_all_records_and_with_follow_those_that_come(run, job):
    log(run, {"step": 0, "eval/loss": 2.0}, {"step": 1, "eval/loss": 3.0})
    assert [record["step"] for record in job.metrics()] == [0, 1]
    seen: list[float] = []
    has_two = threading.Event()

    def follow() -> None:
        for record in job.metrics(follow=True, poll_interval_s=0.01):
            seen.append(record["step"])
            if len(seen) == 2:
                has_two.set()

    with run.supervised():
        reader = threading.Thread(target=follow)
        reader.start()
        assert has_two.wait(30)
        log(run, {"step": 2, "eval/loss": 1.0})
        assert reader.is_alive()
    reader.join(30)
    assert seen == [0, 1, 2]
    assert job.best() == BestValue(2, "eval/loss", 1.0)


def test_wait_calls_back_with_each_new_record_up_to_the_last(run, job):
    log(run, {"step": 0})
    steps: list[float] = []

    def note(record: dict[str, float]) -> None:
        steps.append(record["step"])

    outcomes: list[Outcome] = []
    with run.supervised():
        waiter = threading.Thread(target=lambda: outcomes.append(job.wait(30, 0.01, note)))
        waiter.start()
        while not steps:  # records from before the wait are not repeated, so the first is a new one
            log(run, {"step": 1})
            waiter.join(0.05)
        log(run, {"step": 2})
        run.write_outcome(OUTCOME)
    waiter.join(30)
    assert outcomes == [OUTCOME]
    assert (steps[0], steps[-1]) == (1, 2)


def test_attempts_logs_and_weights(run, job):
    assert (job.attempts(), job.best()) == ([], None)
    run.take_attempt({"host": "here"})
    run.logs.mkdir()
    run.log_file(1).write_text("one\ntwo\n")
    assert job.attempts() == [{"attempt": 1, "host": "here"}]
    assert list(job.logs()) == ["one", "two"]
    with pytest.raises(LaunchError, match=r"runs/small/adapter: does not exist yet; let the run finish first"):
        job.weights()
    (run.root / "adapter-best").mkdir()
    assert job.weights(best=True) == Path("runs/small/adapter-best")


def test_jobs_are_those_of_train_too(run, job):
    assert jobs() == []  # nothing has begun it
    other = RunDir(run.root.with_name("other"))
    other.root.mkdir()
    other.plan_file.write_bytes(run.plan_file.read_bytes())
    write_record(other, JobRecord("local", str(Path.cwd()), 1.0))
    run.take_attempt({})
    assert jobs() == [find_job("other"), job]


def test_a_deleted_job_is_gone_and_a_live_one_is_not_deleted(run, job):
    with run.supervised(), pytest.raises(LaunchError, match="stop it first"):
        job.delete()
    job.delete()
    assert not run.root.exists()
    with pytest.raises(LaunchError, match="no such run"):
        find_job("small")
