"""The state of a job on run directories in every condition; no process is started here."""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from small_recipe import write_small

from trainer import jobs
from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.errors import JobTimeoutError, LaunchError
from trainer.jobs import find_job, reconnect_and_wait, submit
from trainer.jobs.slurm_queue import parse_job
from trainer.jobs.slurm_script import SlurmOptions
from trainer.jobs.start import start_job, stop_job
from trainer.jobs.state import JobRecord, read_record, read_state, write_record
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.pulse import Pulse
from trainer.run.state import Outcome


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    """A run of ten steps that has not begun."""
    monkeypatch.chdir(tmp_path)
    return open_run(make_plan(load_recipe(write_small(tmp_path))))


def outcome(state: str, step: int = 10, exit_code: int = 1) -> Outcome:
    return Outcome(state, step, "words", exit_code)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "is_cancelled", "state"),
    [
        (outcome("finished"), False, "COMPLETED"),
        (outcome("finished"), True, "COMPLETED"),  # the cancellation came too late
        (outcome("finished", step=7), False, "PREEMPTED"),  # the plan has more steps now
        (outcome("preempted", step=3), False, "PREEMPTED"),
        (outcome("failed", step=3), False, "FAILED"),
        (outcome("cancelled", step=3), False, "CANCELLED"),  # Ctrl-C twice
        (outcome("preempted", step=3), True, "CANCELLED"),  # stopped by the cancellation, before the worker knew of it
        (None, True, "CANCELLED"),
        (None, False, "FAILED"),  # gone without a word
    ],
)
def test_state_of_a_run_that_nobody_runs(run, said, is_cancelled, state):
    if said is not None:
        run.write_outcome(said)
    if is_cancelled:
        run.cancel_file.touch()
    assert read_state(run) == state


@pytest.mark.parametrize(
    ("held", "state"), [("locked", "RUNNING"), ("supervised", "RUNNING"), ("launching", "PENDING")]
)
def test_a_process_that_lives_counts_more_than_the_last_outcome(run, held, state):
    run.write_outcome(outcome("preempted", step=3))
    with getattr(run, held)():
        assert read_state(run) == state
        with pytest.raises(LaunchError, match=r"another attempt is running|is running already"):
            start_job(run, "local")
    assert read_state(run) == "PREEMPTED"


def test_only_the_newest_attempt_gives_signs_of_life(run):
    pulse = Pulse()
    assert not pulse.is_alive(run)
    run.write_heartbeat(run.take_attempt({}), 3, "training")
    assert pulse.is_alive(run)
    second = run.take_attempt({})
    assert not pulse.is_alive(run)
    run.write_heartbeat(second, 0, "starting")
    assert pulse.is_alive(run)


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
def test_clock_of_another_machine_is_an_hour_off(run, skew_s):
    def beat(time_s: float) -> None:
        run.heartbeat_file.write_text(
            json.dumps({"attempt": 1, "step": 3, "phase": "training", "time": time_s + skew_s})
        )

    run.take_attempt({})
    beat(time.time())
    pulse = Pulse()
    assert not pulse.is_alive(run), "it may be of yesterday"
    assert not pulse.is_alive(run)
    beat(time.time() + 1)
    assert pulse.is_alive(run), "it changed"
    with run.locked():
        timer = threading.Timer(0.3, lambda: beat(time.time() + 2))
        timer.start()
        assert reconnect_and_wait("small", 0.02, timeout_s=60).state() == "RUNNING"
        timer.join()


def test_record_keeps_the_options_for_the_next_submission(run):
    assert read_record(run) is None
    record = JobRecord("slurm", "/home/me", 1.5, slurm_id="7", slurm=SlurmOptions("gpu", "60", {"account": "a"}))
    write_record(run, record)
    assert read_record(run) == record


def test_plan_of_a_job_that_waits_is_not_replaced(run):
    before = run.plan_file.read_bytes()
    with (
        run.launching(),
        pytest.raises(LaunchError, match="runs/small is pending already; `trainer reconnect runs/small`"),
    ):
        submit("recipe.yaml", set=["steps=20"])
    assert run.plan_file.read_bytes() == before


def test_list_for_people(run, capsys):
    write_record(run, JobRecord("local", str(Path.cwd()), 1.0))
    run.write_outcome(outcome("preempted", step=3))
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == "runs/small  PREEMPTED  step 0 of 10  local\n"


def test_jobs_are_the_submitted_runs_by_age(run):
    for name, when in (("b", 2.0), ("a", 3.0)):
        other = RunDir(run.root.with_name(name))
        other.root.mkdir()
        other.plan_file.write_bytes(run.plan_file.read_bytes())
        write_record(other, JobRecord("local", str(Path.cwd()), when))
    assert [job.id for job in jobs.jobs()] == ["runs/b", "runs/a"]
    assert find_job("a").id == "runs/a"


def test_finished_run_is_left_as_it_is(run):
    run.write_outcome(outcome("finished", exit_code=0))
    assert reconnect_and_wait("small").state() == "COMPLETED"
    assert find_job("small").wait(0) == outcome("finished", exit_code=0)
    with pytest.raises(LaunchError, match="runs/small is not running: completed"):
        stop_job(run)


def test_running_run_is_joined_by_its_heartbeat(run):
    with run.locked():
        with pytest.raises(JobTimeoutError, match="runs/small: still running; it continues"):
            reconnect_and_wait("small", 0.01, timeout_s=0.05)
        run.write_heartbeat(run.take_attempt({}), 3, "training")
        assert reconnect_and_wait("small", 0.01, timeout_s=0.05).state() == "RUNNING"
        with pytest.raises(JobTimeoutError, match=r"running after 0\.05 s"):
            find_job("small").wait(0.05, 0.01)


def test_pending_has_a_patience_of_its_own(run):
    with run.launching(), pytest.raises(JobTimeoutError, match="still pending"):
        reconnect_and_wait("small", 0.01, timeout_s=60, pending_timeout_s=0.05)


def test_mistake_of_the_user_is_not_resumed(run):
    run.write_outcome(outcome("failed", exit_code=2))
    with pytest.raises(LaunchError, match="cannot be resumed: another attempt would fail the same way: words"):
        reconnect_and_wait("small", 0.01)
    assert read_record(run) is None, "nothing was started"


def test_submission_that_fails_leaves_the_run_as_it_was(run, monkeypatch):
    run.write_outcome(outcome("preempted", step=3))
    run.cancel_file.touch()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"sbatch: not installed here. Submit on a machine that has Slurm's commands"):
        start_job(run, "slurm")
    assert run.read_outcome() == outcome("preempted", step=3)
    assert read_state(run) == "CANCELLED"
    assert read_record(run) is None


def test_directory_without_a_plan_is_no_job(run):
    run.plan_file.unlink()
    with pytest.raises(LaunchError, match="small: no such run"):
        reconnect_and_wait("small")


def test_unreadable_state_is_asked_for_again(run):
    """As where a file system is away for a moment: here the outcome cannot be opened as a file."""
    run.outcome_file.mkdir()
    begin = time.monotonic()
    with pytest.raises(IsADirectoryError):
        reconnect_and_wait("small", 0.01, max_wait_for_resumable_s=0.2)
    assert time.monotonic() - begin >= 0.2

    def mend() -> None:
        run.outcome_file.rmdir()
        run.write_outcome(outcome("finished"))

    with ExitStack() as stack:
        timer = threading.Timer(0.2, mend)
        stack.callback(timer.join)
        timer.start()
        assert reconnect_and_wait("small", 0.01, max_wait_for_resumable_s=30).state() == "COMPLETED"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("JobId=1 JobName=a UserId=root(0) Priority=1 JobState=PENDING Reason=BeginTime Dependency=(null)", "PENDING"),
        ("JobId=1 JobName=JobState=X JobState=RUNNING Reason=None", "RUNNING"),
    ],
)
def test_state_is_read_from_what_slurm_prints(line, state):
    assert parse_job(line).state == state
