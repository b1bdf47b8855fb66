"""The words of `trainer status` in every state, what it reads, and tables on a terminal and elsewhere."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from small_recipe import write_small

from trainer.commands.cli import main
from trainer.commands.status import describe_run
from trainer.commands.tables import table_lines
from trainer.config.load import load_recipe
from trainer.jobs.state import JobRecord, observe, write_record
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.state import Outcome, RunState


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    """A run of ten steps that has not begun."""
    monkeypatch.chdir(tmp_path)
    return open_run(make_plan(load_recipe(write_small(tmp_path))))


def beat(run: RunDir, age_s: float = 0.0) -> None:
    """The newest attempt's heartbeat, as old as wanted."""
    run.write_heartbeat(run.take_attempt({}), 3, "training")
    about = json.loads(run.heartbeat_file.read_text())
    run.heartbeat_file.write_text(json.dumps(about | {"time": about["time"] - age_s}))


@pytest.mark.parametrize(
    ("held", "age_s", "end", "state", "word"),
    [
        (None, None, None, RunState.NEW, "pending"),
        ("launching", None, None, RunState.LAUNCHED, "starting"),
        ("supervised", None, None, RunState.STARTING, "starting"),
        ("locked", None, None, RunState.SILENT, "running, no heartbeat"),
        ("locked", 0.0, None, RunState.RUNNING, "running"),
        ("locked", 31.0, None, RunState.SILENT, "running, no heartbeat"),
        (None, 31.0, None, RunState.INTERRUPTED, "interrupted"),
        (None, 31.0, "preempted", RunState.PREEMPTED, "preempted"),
        (None, 31.0, "failed", RunState.FAILED, "failed"),
        (None, 31.0, "cancelled", RunState.CANCELLED, "cancelled"),
        (None, 31.0, "finished", RunState.FINISHED, "finished"),
        ("supervised", 31.0, "failed", RunState.STARTING, "failed"),  # between two attempts
    ],
)
def test_word_of_each_state(run, held, age_s, end, state, word):
    if age_s is not None:
        beat(run, age_s)
    if end is not None:
        run.write_outcome(Outcome(end, 10, "words", 0))
    with getattr(run, held)() if held else nullcontext():
        assert observe(run) is state
        assert describe_run(run).state == word


def test_status_reads_the_end_of_the_metrics_only(run, capsys):
    run.metrics_file.write_text("no record\n" * 300_000)
    with run.metrics_file.open("a") as file:
        file.writelines(
            json.dumps({"step": step, "time": 100.0 + 2 * step, "train/loss": 0.5}) + "\n" for step in (1, 2, 3)
        )
    beat(run)
    with run.locked():
        assert main(["status", "small", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about == {
        "run": "runs/small", "state": "running", "step": 3, "steps": 10, "phase": "training", "attempts": 1,
        "seconds_left": 14.0, "message": None, "metrics": {"step": 3, "time": 106.0, "train/loss": 0.5},
        "wandb": None,
        "trackers": {},
    }  # fmt: skip


def test_follow_begins_with_the_newest_records_and_ends_with_the_outcome(run, capsys):
    records = (json.dumps({"step": step, "time": 1.0, "eval/loss": 0.5}) + "\n" for step in range(100))
    run.metrics_file.write_text("".join(records))
    run.write_outcome(Outcome("finished", 10, "finished 10 steps of runs/small", 0))
    assert main(["status", "small", "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("80/10  held-out loss 0.5000")
    assert len(lines) == 21
    assert lines[-1] == "finished 10 steps of runs/small"


def test_damaged_outcome_is_said_without_a_traceback(run, capsys):
    run.outcome_file.write_text("\0\0")
    assert main(["status", "small"]) == 2
    assert capsys.readouterr().err.startswith("runs/small/outcome.json: damaged (")


def test_table_elsewhere_has_one_line_per_row_and_keeps_brackets():
    long = "x" * 300
    assert table_lines([("[a]", "[bold]b[/]"), ("ccc", long)]) == ["[a]  [bold]b[/]", f"ccc  {long}"]


def test_no_jobs_are_no_lines(run, capsys):
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == ""


def test_table_on_a_terminal_has_a_header(run):
    write_record(run, JobRecord("local", str(Path.cwd()), 1.0))
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "trainer", "jobs"]
    subprocess.run(argv, stdout=theirs, check=True, env=os.environ | {"TERM": "dumb", "COLUMNS": "80"})
    os.close(theirs)
    shown = os.read(ours, 10_000).decode().split("\r\n")
    os.close(ours)
    assert shown[0].split() == ["job", "state", "progress", "launcher"]
    assert shown[1].split() == ["runs/small", "FAILED", "step", "0", "of", "10", "local"]
