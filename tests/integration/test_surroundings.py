"""What a process may lack: standard streams, a home directory, a user name, room on the disk behind stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import BIN, Project

TRAIN = f"{BIN}/trainer train recipe.yaml"


def shell(project: Project, command: str) -> int:
    running = project.start(["/bin/sh", "-c", command])
    return running.wait().code


@pytest.mark.parametrize("streams", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_run_without_a_terminal_finishes(project: Project, streams: str) -> None:
    assert shell(project, f"{TRAIN} {streams}") == 0
    assert project.run("tiny").outcome()["state"] == "finished"
    text = (project.root / "runs/tiny/plan.json").read_text()
    assert json.loads(text)["steps"] == 6, "nothing is printed into a file that got the number of a closed stream"


def test_reader_that_went_away_does_not_stop_the_run(project: Project) -> None:
    assert shell(project, f"{TRAIN} 2>&1 | head -n 1") == 0
    assert project.run("tiny").outcome()["state"] == "finished"


def test_full_disk_behind_stdout_is_said(project: Project) -> None:
    done = project.start(["/bin/sh", "-c", f"{BIN}/trainer shapes >/dev/full"]).wait()
    assert done.code == 1
    assert done.stderr == "output: No space left on device\n"


@pytest.fixture
def unknown_user() -> Iterator[list[str]]:
    """Runs a command as a user id that /etc/passwd does not have."""
    argv = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if shutil.which("unshare") is None or subprocess.run([*argv, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces")
    yield ["env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "-u", "HF_HOME", *argv]
    shutil.rmtree("/tmp/tunesmith-54321", ignore_errors=True)


def test_user_without_passwd_entry_and_home(project: Project, unknown_user: list[str], tmp_path: Path) -> None:
    project.recipe(logging__wandb="offline")
    done = project.start([*unknown_user, str(BIN / "trainer"), "train", "recipe.yaml"]).wait()
    assert done.code == 0, done.said
    assert "Traceback" not in done.stderr + project.run("tiny").log()
    assert json.loads((tmp_path / "runs/tiny/wandb.json").read_text())["problem"] is None
