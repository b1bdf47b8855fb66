"""What Slurm says about a job id, and whether that job is the run's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_recipe import write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.errors import LaunchError
from trainer.jobs import slurm_queue
from trainer.jobs.slurm_queue import QueuedJob, parse_job, parse_time_limit
from trainer.jobs.slurm_script import SlurmOptions
from trainer.jobs.state import JobRecord, is_submission, slurm_job, write_record
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run

LINE = (
    "JobId=7 JobName=small UserId=me(1) Priority=0 JobState=PENDING Reason=JobHeldUser Restarts=0 "
    "SubmitTime=2026-05-04T11:22:33 StartTime=Unknown CPUs/Task=1 Command=/a b/job.sh WorkDir={} StdErr=/x StdIn="
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that was submitted to Slurm as job 7, in a directory with a space."""
    project = tmp_path / "my project"
    project.mkdir()
    monkeypatch.chdir(project)
    run = open_run(make_plan(load_recipe(write_small(Path()))))
    write_record(run, record(run))
    return run


def record(run: RunDir) -> JobRecord:
    return JobRecord(
        "slurm",
        str(Path.cwd()),
        1.0,
        slurm_id="7",
        slurm=SlurmOptions(),
        root=str(run.root.resolve()),
        slurm_submitted="2026-05-04T11:22:33",
    )


def job() -> QueuedJob:
    return parse_job(LINE.format(Path.cwd()))


def test_own_job(run: RunDir) -> None:
    assert slurm_job(run, lambda slurm_id: job()) == job()
    assert job().wait == "held; `scontrol release 7` releases it"


@pytest.mark.parametrize(
    ("changes", "is_own"),
    [
        ({"name": "other"}, False),
        ({"directory": "/elsewhere"}, False),
        ({"submitted": "2026-06-01T00:00:00"}, False),
        ({"submitted": "2026-06-01T00:00:00", "restarts": 1}, True),
        ({"submitted": "2026-01-01T00:00:00", "restarts": 1}, False),
        ({"state": "RUNNING"}, True),
    ],
)
def test_job_of_another_has_the_id(run: RunDir, changes: dict[str, Any], is_own: bool) -> None:
    assert is_submission(replace(job(), **changes), record(run), run) is is_own


def test_copied_run_does_not_own_the_job_of_the_original(run: RunDir) -> None:
    copy = RunDir(run.root.parents[1] / "copy" / run.name)
    copy.root.mkdir(parents=True)
    write_record(copy, record(run))
    assert slurm_job(copy, lambda slurm_id: job()) is None


def test_hanging_controller_is_asked_once_for_all_jobs(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "c"):
        other = open_run(make_plan(load_recipe(Path("recipe.yaml"))), name)
        write_record(other, record(other))
    programs = Path("bin")
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho asked >> asked\nexec sleep 60\n")
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs.resolve()), prepend=":")
    monkeypatch.setattr(slurm_queue, "QUERY_S", 0.3)
    assert main(["jobs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in listed] == ["unknown: scontrol: no answer within 0.3 s"] * 3
    assert Path("asked").read_text().split() == ["asked"]


def test_array_is_refused(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", "recipe.yaml", "--launcher", "slurm", "--slurm", "array=1-3", "--name", "new"]
    assert main(arguments) == 2
    assert main([*arguments, "--print"]) == 2
    assert capsys.readouterr().err.count("--slurm array: every task of the array would be the same run") == 2
    assert not Path("runs/new").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:05:30", 3930), ("2-1", 176400), ("2-1:30", 178200), ("2-1:30:10", 178210)],
)
def test_time_limits_of_slurm(text: str, seconds: float) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-", "12h"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="not a time limit of Slurm"):
        parse_time_limit(text)
